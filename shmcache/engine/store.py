# cython: boundscheck=True
# Not hot, and a list that another thread has changed is an error then, not a crash: here indexes of lists are checked.
"""The face of the engine: Python objects in, Python objects out, one crossing from Python per operation.

Here the clock is read, the shard is chosen and hits are counted; `request.py` turns keys and values into bytes and
back, `reader.py` and `shard.py` do the rest. A `get` goes: `Request.set_key`, `_find`, `_now`, `Reader.read_once`,
perhaps `Shard.promote`, `Request.value`. A `set` goes: `_put`, `_now`, `Request.set_key` and `set_value`, `_change`,
`Shard.run_one`, `enter`, `perform_locked`, `put_locked` (evict, reserve blocks, write), `insert_locked` or
`overwrite_locked`, `leave`.

Another thread may close the cache in the midst of an operation, or move it to a new attachment because its files were
unlinked. Who then waits for a lock of the old one gets CacheClosed, and has done nothing. Whoever catches that calls
`_refresh`, which raises it again only if the cache was closed, and goes on where we are now: `_steadily` is that for
everything but reads, and the first attempt of `_change`, which goes without for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.primitives import *
    from cython.cimports.shmcache.engine.request import Request
    from cython.cimports.shmcache.engine.shard import Shard
else:
    from shmcache.engine.layout import *
    from shmcache.engine.primitives import *
    from shmcache.engine.request import Request
    from shmcache.engine.shard import Shard

from shmcache.engine.membership import nobody
from shmcache.errors import (
    CacheClosed,
    LockTimeout,
    SerializationError,
    ShmcacheError,
    ValueTooLarge,
    contradiction,
)

__all__ = ["DEFAULT", "Default", "Store", "is_compiled", "ttl_to_ns"]


class Default:
    """The type of `DEFAULT`, which stands for an argument that was not given where None means something else."""

    def __repr__(self) -> str:
        return "DEFAULT"

    def __reduce__(self) -> str:
        return "DEFAULT"


DEFAULT = Default()

Result = TypeVar("Result")

Integer: TypeAlias = int  # for a plain `int` Cython would convert what is none, before we can refuse it

MAX_TTL_NS = 1 << 62  # 146 years
CLOSED = 0  # epochs that no process has: the cache was closed, or
ADRIFT = (1 << 64) - 1  # its files are gone and there is no room for new ones yet

watch_forks()


def is_compiled() -> bool:
    """Whether the compiled engine runs, rather than its sources."""
    return bool(cython.compiled)


def ttl_to_ns(ttl: object, name: str = "ttl") -> int:
    """A time to live in seconds as ns, None as 0; raises TypeError or ValueError for anything but a positive number."""
    if ttl is None:
        return 0
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(f"{name} is a number of seconds or None for no expiry, not {type(ttl).__name__} ({ttl!r})")
    if not 0 < ttl < float("inf"):
        raise ValueError(f"{name}={ttl!r}: expected a positive, finite number of seconds, or None for no expiry")
    if ttl > MAX_TTL_NS // 1_000_000_000:
        raise ValueError(f"{name}={ttl!r} is longer than 146 years: use None for no expiry")
    return int(ttl * 1_000_000_000) or 1


@cython.cfunc
@cython.inline
def shard_of(request: Request, shards: list[Shard]) -> Shard:
    """Hash the key with the secret of these shards, and choose the one that it belongs to."""
    first: Shard = shards[0]
    request.hash = key_hash(request.key, request.key_size, request.key_kind, first.secret0, first.secret1)
    return shards[high(high(request.hash) * first.shards)]


@cython.cclass
class Store:
    """The hot operations of a cache on one attachment. `Cache` adds everything else.

    `clock` returns ns and replaces the system's monotonic clock, for tests. A subclass provides `_reattach`, called
    when the files were unlinked, and receives the objects of the attachment through `_adopt`. `codec` has `encode` and
    `decode`, for values that `request.py` leaves to it.
    """

    def __init__(
        self,
        codec: Any,
        lock_timeout: float,
        clock: Callable[[], int] | None,
    ) -> None:
        self._codec = codec
        self._timeout_ns = int(lock_timeout * 1e9)
        self._clock = clock
        self._spare = Request()
        self._attachment: Any = None
        self._shards: list[Shard] = []
        self._epoch = CLOSED

    def _process_epoch(self) -> int:
        """This process, as a number that a forked child does not have."""
        return process_epoch()

    def _adopt(self, attachment: Any, default_ttl_ns: int, epoch: int) -> None:
        """Work on this attachment from now on. `epoch` is that of before it was made: a signal handler may fork."""
        self._attachment = attachment
        self._shards = attachment.shards
        self._member = attachment.member
        self._shard_count = attachment.geometry.shards
        self._max_entry = attachment.geometry.max_entry_bytes
        self._default_ttl_ns = default_ttl_ns
        self._epoch = epoch
        self._next_check = self._read_clock() + CHECK_NS

    def _attached(self) -> Any:
        """The attachment, once forks and unlinked files have been seen to, as by every operation. Or CacheClosed."""
        self._now()
        attachment = self._attachment
        while attachment is None:  # another thread closed it just now, or is moving us
            self._refresh()
            attachment = self._attachment
        return attachment

    def _abandon(self, adrift: bool = False) -> None:
        """Work on nothing: every operation raises CacheClosed or, `adrift`, begins with another `_reattach`."""
        self._epoch = ADRIFT if adrift else CLOSED
        self._attachment = None
        self._member = nobody()  # for a thread that is in an operation
        self._shards = []

    def _reattach(self, old: Any) -> None:
        raise NotImplementedError  # pragma: no cover - for a subclass to provide

    # --- reading ----------------------------------------------------------------------------------------------------
    @cython.binding(False)  # a function object around it would be a tenth of its instructions
    @cython.embedsignature.format("clinic")  # so that `inspect` finds a signature all the same
    def get(self, key: object, default: Any = None) -> Any:
        """The value of `key`, or `default` if it is missing or expired. A stored None is a hit."""
        request: Request = self._take()
        request.set_key(key)
        if self._find(request, True):
            default = request.value(self._codec)
        self._give(request)
        return default

    def gets(self, key: object, default: Any = None) -> tuple[Any, int | None]:
        """The value of `key` and its version for `cas`; `(default, None)` if it is missing."""
        request: Request = self._take()
        answer: tuple[Any, int | None] = (default, None)
        request.set_key(key)
        if self._find(request, True):
            answer = (request.value(self._codec), request.version)
        self._give(request)
        return answer

    def get_many(self, keys: Iterable[object]) -> dict[Any, Any]:
        """The values of those of `keys` that are present."""
        request: Request = self._take()
        found = {}
        for key in _several(keys):
            request.set_key(key)
            if self._find(request, True):
                found[key] = request.value(self._codec)
        self._give(request)
        return found

    def __contains__(self, key: object) -> bool:
        request: Request = self._take()
        request.set_key(key)
        found: cython.bint = self._find(request, False) != 0
        self._give(request)
        return found

    def __getitem__(self, key: object) -> Any:
        request: Request = self._take()
        request.set_key(key)
        if not self._find(request, True):
            self._give(request)
            raise KeyError(key)
        value = request.value(self._codec)
        self._give(request)
        return value

    def ttl(self, key: object) -> float | None:
        """Seconds until `key` expires, None if it never does; raises KeyError if it is missing."""
        request: Request = self._take()
        request.set_key(key)
        if not self._find(request, False):
            self._give(request)
            raise KeyError(key)
        left: float | None = (request.expiry - request.now) / 1e9 if request.expiry else None
        self._give(request)
        return left

    # --- writing ----------------------------------------------------------------------------------------------------
    def set(self, key: object, value: object, ttl: object = DEFAULT) -> None:
        """Store `value` under `key` for `ttl` seconds (default: the cache's `default_ttl`; None: until evicted).

        Raises SerializationError, KeyTooLarge, ValueTooLarge (what was stored before is kept), LockTimeout.
        """
        self._put(OP_SET, key, value, ttl, 0)

    def __setitem__(self, key: object, value: object) -> None:
        self._put(OP_SET, key, value, DEFAULT, 0)

    def add(self, key: object, value: object, ttl: object = DEFAULT) -> bool:
        """Store `value` only if `key` is missing; whether it was stored."""
        return self._put(OP_ADD, key, value, ttl, 0) == DONE

    def replace(self, key: object, value: object, ttl: object = DEFAULT) -> bool:
        """Store `value` only if `key` is present; whether it was stored."""
        return self._put(OP_REPLACE, key, value, ttl, 0) == DONE

    def cas(self, key: object, value: object, version: Integer | None, ttl: object = DEFAULT) -> bool:
        """Store `value` only if the entry still has the version that `gets` gave; whether it was stored.

        With the version None, which `gets` gives for a missing key, this is `add`.
        """
        if version is None:
            return self._put(OP_ADD, key, value, ttl, 0) == DONE
        if type(version) is not int:
            raise TypeError(f"version is an int or None, as gets gives it, not {type(version).__name__} ({version!r})")
        if not 0 < version < 1 << 63:
            return False  # no entry has such a version
        return self._put(OP_CAS, key, value, ttl, version) == DONE

    def delete(self, key: object) -> bool:
        """Remove `key`; whether it was present."""
        request: Request = self._take()
        now: cython.ulonglong = self._now()
        request.set_key(key)
        deleted: cython.bint = self._change(request, OP_DELETE, now) == DONE
        if deleted:
            self._member.count(C_DELETES, 1)
        self._give(request)
        return deleted

    def __delitem__(self, key: object) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def pop(self, key: object, default: Any = DEFAULT) -> Any:
        """Remove `key` and return its value: exactly one of several callers gets it. KeyError without `default`."""
        request: Request = self._take()
        now: cython.ulonglong
        request.set_key(key)
        while self._find(request, True):
            value = request.value(self._codec)
            now = self._now()
            if self._change(request, OP_DELETE_VERSION, now) == DONE:
                self._member.count(C_DELETES, 1)
                self._give(request)
                return value
        self._give(request)
        if default is DEFAULT:
            raise KeyError(key)
        return default

    def touch(self, key: object, ttl: object = DEFAULT) -> bool:
        """Give `key` a new time to live, counted from now; whether it was present. Its version becomes another."""
        request: Request = self._take()
        now: cython.ulonglong = self._now()
        request.set_key(key)
        self._set_ttl(request, ttl, now)
        touched: cython.bint = self._change(request, OP_TOUCH, now) == DONE
        self._give(request)
        return touched

    def incr(self, key: object, delta: Integer = 1, initial: Integer | None = None, ttl: object = DEFAULT) -> int:
        """Add `delta` to the integer under `key`, atomically, and return the sum; the entry keeps its time to live.

        A missing key is stored as `initial + delta` with `ttl`, or raises KeyError without `initial`. Raises TypeError
        if the value is no integer, OverflowError if value or sum does not fit 64 signed bits.
        """
        request: Request = self._take()
        now: cython.ulonglong = self._now()
        status: cython.int
        request.set_key(key)
        self._set_ttl(request, ttl, now)
        self._set_step(request, delta, initial)
        status = self._change(request, OP_INCR, now)
        if status != DONE:
            raise self._incr_error(key, status)
        self._member.count(C_SETS, 1)
        number: cython.longlong = request.number
        self._give(request)
        return number

    def decr(self, key: object, delta: Integer = 1, initial: Integer | None = None, ttl: object = DEFAULT) -> int:
        """`incr` by `-delta`."""
        return self.incr(key, -_integer(delta, "delta"), initial, ttl)

    def _set_step(self, request: Request, delta: object, initial: object) -> int:
        """Fill in what `incr` adds, and to what if the key is missing."""
        request.number = _integer(delta, "delta")
        request.has_initial = initial is not None
        request.initial = 0 if initial is None else _integer(initial, "initial")
        return 0

    def _incr_error(self, key: object, status: int) -> Exception:
        """Why `incr` failed."""
        if status == NOT_A_NUMBER:
            return TypeError(f"the value of {key!r} is not an integer of 64 signed bits: incr and decr need one")
        if status == OUT_OF_RANGE:
            return OverflowError(f"the value of {key!r}, or the sum, does not fit 64 signed bits: it is unchanged")
        return KeyError(key)

    # --- many at once -----------------------------------------------------------------------------------------------
    def set_many(self, mapping: Mapping[Any, object], ttl: object = DEFAULT) -> None:
        """Store every item; takes each shard's lock once. Nothing is stored if one of them cannot be serialized.

        Raises ValueTooLarge if one of them does not fit; the others are stored.
        """
        keys = []
        requests = []
        now: cython.ulonglong = self._now()
        request: Request
        if not hasattr(mapping, "items"):
            raise TypeError(f"set_many takes a mapping of keys to values, not {type(mapping).__name__}")
        for key, value in mapping.items():
            keys.append(key)
            requests.append(self._prepare(OP_SET, key, value, ttl, now))
        self._run_all(requests, now)
        for key, request in zip(keys, requests, strict=True):
            failure = self._failure(request.status)
            if failure is not None:
                raise _naming(key, failure)

    def delete_many(self, keys: Iterable[object]) -> int:
        """Remove the keys, taking each shard's lock once; how many were present."""
        requests = []
        now: cython.ulonglong = self._now()
        deleted = 0
        request: Request
        for key in _several(keys):
            requests.append(self._prepare(OP_DELETE, key, None, None, now))
        self._run_all(requests, now)
        for request in requests:
            deleted += request.status == DONE
        return deleted

    def _prepare(self, op: int, key: object, value: Any, ttl: object, now: int) -> Request:
        """A request of its own for `_run_all`."""
        request: Request = Request()
        request.op = op
        request.status = UNDONE
        request.set_key(key)
        if op == OP_READ:
            request.room = SCRATCH
            request.make_room()
        if op == OP_INCR:
            delta, initial = value
            self._set_step(request, delta, initial)
        elif op <= OP_CAS:
            try:
                request.set_value(value, self._codec)
            except (SerializationError, ValueTooLarge) as error:
                raise _naming(key, error) from error
        if op <= OP_CAS or op == OP_TOUCH:
            self._set_ttl(request, ttl, now)
        return request

    def _run_all(self, requests: list[Request], now: int) -> None:
        """Perform and count prepared requests, in order within a shard, taking each shard's lock once."""
        request: Request
        try:
            self._steadily(self._run_undone, requests, now)
        finally:
            for request in requests:
                self._count(request)

    def _run_undone(self, requests: list[Request], now: int) -> None:
        """Perform those of the requests that were not yet: none twice, however often `_steadily` begins again."""
        request: Request
        shard: Shard
        groups: dict[int, list[Request]] = {}
        if process_epoch() != self._epoch:
            self._refresh()  # the serializer or a signal handler forked, and this is the child
        shards = self._here()
        for request in requests:
            if request.status >= UNDONE:
                shard = shard_of(request, shards)
                groups.setdefault(shard.number, []).append(request)
        for number in sorted(groups):
            group = groups[number]
            shard = shards[number]
            done = 0
            while done < len(group):
                done = shard.run(group, done, now, self._timeout_ns)
                if done < len(group):
                    self._make_way(group[done], shards, now)

    def _count(self, request: Request) -> None:
        """Count a request that was performed."""
        if request.op == OP_READ and (request.status == DONE or request.status == ABSENT):
            self._member.count(C_HITS if request.status == DONE else C_MISSES, 1)
        elif request.status == DONE:
            if request.op == OP_DELETE:
                self._member.count(C_DELETES, 1)
            elif request.op <= OP_CAS:
                self._member.count(C_SETS, 1)

    def _perform(self, operations: list[tuple[int, object, object, object]]) -> list[tuple[int, Any]]:
        """Perform (op, key, value, ttl) each, in order within a shard: status and result, or an exception as result.

        OP_READ gives the value. OP_INCR has (delta, initial) as its value, and gives the sum. What stops the group half
        way, such as LockTimeout, is the result of every operation that was not performed.
        """
        now: cython.ulonglong = self._now()
        requests = [self._prepare(op, key, value, ttl, now) for op, key, value, ttl in operations]
        outcomes: list[tuple[int, Any]] = []
        stopped: Exception | None = None
        try:
            self._run_all(requests, now)
        except ShmcacheError as error:
            stopped = error
        for request, operation in zip(requests, operations, strict=True):
            outcomes.append(self._outcome(request, operation[1], stopped))
        return outcomes

    def _outcome(self, request: Request, key: object, stopped: Exception | None) -> tuple[int, Any]:
        """What became of one operation of a group."""
        if request.status >= UNDONE:
            return request.status, stopped
        if request.status >= CORRUPT:
            return request.status, self._failure(request.status)
        if request.op == OP_INCR:
            return request.status, (request.number if request.status == DONE else self._incr_error(key, request.status))
        if request.op == OP_READ and request.status == DONE:
            try:
                return DONE, request.value(self._codec)
            except SerializationError as error:
                return DONE, error
        return request.status, None

    def clear(self) -> None:
        """Remove every entry. Each shard is emptied as a whole, one after the other."""
        self._steadily(self._run_everywhere, OP_CLEAR)

    def purge(self) -> int:
        """Remove every expired entry now; how many there were. (Expired entries are never seen; this frees memory.)"""
        return self._steadily(self._run_everywhere, OP_PURGE)

    def _run_everywhere(self, op: int) -> int:
        """Perform an operation on every shard; how many entries it removed, if it counts them."""
        now: cython.ulonglong = self._now()
        request: Request = self._take()
        removed: cython.longlong = 0
        shard: Shard
        request.op = op
        request.number = 0
        for shard in self._here():
            request.status = BUSY
            while request.status == BUSY:  # in batches, so that others get the lock
                shard.run_one(request, now, self._timeout_ns)
                self._raise_for(request.status)
                removed += request.number
        self._give(request)
        return removed

    # --- looking around ---------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """The number of entries; expired ones are removed first."""
        self.purge()
        total: cython.ulonglong = 0
        shard: Shard
        for shard in self._here():
            total += min(load(shard.words, shard.header + S_ENTRIES), shard.slots)
        return total

    def _scan(self, position: int, count: int, values: bool) -> tuple[list[tuple[Any, Any]], int | None]:
        """Entries from slot `position` on, at most `count` of them, without a lock, and where to go on (None: the end).

        An entry that is there all the while is in the answer exactly once, one that comes or goes perhaps; a key that
        is deleted and stored again may be seen as both. The second of a pair is the value, or None without `values`.
        """
        now: cython.ulonglong = self._now()
        request: Request = self._take()
        entries: list[tuple[Any, Any]] = []
        place: cython.ulonglong = position
        shards = self._here()
        shard: Shard = shards[0]
        slots: cython.ulonglong = shard.slots
        total: cython.ulonglong = slots * len(shards)
        status: cython.int
        tries: cython.int
        while place < total and len(entries) < count:
            shard = shards[place // slots]
            request.slot = place % slots
            tries = 0
            status = BUSY
            while status == BUSY and tries < READ_ATTEMPTS:
                status = shard.reader.read_slot(request, request.slot, now)
                if status == NO_ROOM:
                    request.make_room()
                    status = BUSY
                tries += 1
            if status == BUSY:  # somebody is changing this entry, or died while doing so
                status = self._read_locked(request, shard, OP_READ_SLOT, now)
            self._raise_for(status)
            if status == DONE:
                key = request.found_key()
                if values:
                    copy(request.scratch, 0, request.scratch, request.key_size, request.value_size)
                    entries.append((key, request.value(self._codec)))
                else:
                    entries.append((key, None))
            place += 1
        self._give(request)
        return entries, (place if place < total else None)

    def _describe(self, key: object) -> tuple[int, int, int, int, int] | None:
        """(version, ns left or 0, key bytes, value bytes, shard), without counting a hit."""
        now: cython.ulonglong = self._now()
        request: Request = self._take()
        request.wants_value = False
        request.set_key(key)
        shard: Shard = shard_of(request, self._here())
        status: cython.int = shard.reader.read(request, now)
        answer = None
        if status == BUSY:
            status = self._read_locked(request, shard, OP_READ, now)
        self._raise_for(status)
        if status == DONE:
            left = request.expiry - now if request.expiry else 0
            answer = (request.version, left, request.key_size, request.value_size, shard.number)
        self._give(request)
        return answer

    def _inspect_all(self, rebuild: bool) -> list[str]:
        self._now()
        return self._inspect(self._here(), rebuild)

    def _inspect(self, shards: list[Shard], rebuild: bool) -> list[str]:
        """What `repair.py` says of these shards."""
        now: cython.ulonglong = self._now()
        shard: Shard
        said = []
        for shard in shards:
            for text in shard.inspect(rebuild, now, self._timeout_ns):
                said.append(f"shard {shard.number}: {text}")
        return said

    # --- the way of an operation ------------------------------------------------------------------------------------
    def _now(self) -> int:
        """The time, ns; and at most every quarter of a second, whether all is still as it was."""
        now: cython.ulonglong = now_ns() if self._clock is None else self._clock()
        if process_epoch() != self._epoch or now >= self._next_check:
            self._refresh()
        return now

    def _read_clock(self) -> int:
        return now_ns() if self._clock is None else self._clock()

    def _refresh(self) -> None:
        """See to it that we are attached: to new files if these were unlinked, with a line of our own if we lack one.

        Raises CacheClosed if the cache was closed.
        """
        if self._epoch == CLOSED:
            raise self._closed_error()
        epoch: cython.ulonglong = process_epoch()
        attachment = self._attachment
        current = attachment is not None and attachment.is_current()  # lets other threads run
        if self._epoch == CLOSED:
            raise self._closed_error()
        try:
            if not current or self._attachment is not attachment:
                self._reattach(attachment)
            else:
                attachment.member.join(self._timeout_ns / 1e9)
                self._epoch = epoch
        except CacheClosed:
            if self._attachment is attachment:
                raise
            # Another thread moved us while this one waited, or closed the cache: whoever goes on will see.
        self._next_check = self._read_clock() + CHECK_NS

    def _steadily(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do `work`, which must do nothing twice; again if another thread moved us to a new attachment meanwhile."""
        while True:
            try:
                return work(*arguments)
            except CacheClosed:
                self._refresh()

    def _here(self) -> list[Shard]:
        """The shards to work on. What depends on more than one of them asks once."""
        shards = self._shards
        while not shards:
            self._refresh()  # waits for the thread that is just moving us
            shards = self._shards
        return shards

    def _take(self) -> Request:
        """A request nobody else uses: another thread may run while this one waits for a lock."""
        if cython.compiled:
            request = self._spare
            if request is None or request.in_use:  # by another thread, or by an operation that raised
                request = self._spare = Request()
            request.in_use = True
            return request
        return Request()  # threads switch anywhere, so two might find the same one

    def _give(self, request: Request) -> None:
        request.release()

    def _closed_error(self) -> Exception:
        return CacheClosed("this cache is closed: make a new Cache object of the same name to go on")

    def _find(self, request: Request, wants_value: cython.bint) -> int:
        """Look the request's key up and count it: 1 with, if wanted, a copy of the value in the request, or 0."""
        now: cython.ulonglong = self._now()
        request.now = now
        request.wants_value = wants_value
        if not cython.compiled:  # it is a new one, and without room it would be read twice
            request.room = SCRATCH
            request.make_room()
        shards: list[Shard] = self._shards
        if not shards:
            shards = self._here()
        shard: Shard = shard_of(request, shards)
        status: cython.int = shard.reader.read_once(request, now)  # as `Reader.read`, without a call of it
        if status == BUSY or status == NO_ROOM:
            status = shard.reader.read_again(request, now, status)
            if status == BUSY:
                status = self._read_locked(request, shard, OP_READ, now)
        if status == DONE:
            if shard.order.is_stale(request.slot):
                shard.promote(request)
            self._member.count(C_HITS, 1)
            return 1
        if status >= CORRUPT:
            self._raise_for(status)
        self._member.count(C_MISSES, 1)
        return 0

    def _read_locked(self, request: Request, shard: Shard, op: cython.int, now: cython.ulonglong) -> int:
        """Read as the owner of the lock. A holder that is stopped must not stop readers, so this soon gives up.

        A call that reads many entries gives a shard up once, and does not wait for it again.
        """
        request.op = op
        status: cython.int = NO_ROOM
        waits: cython.int = 0
        stamp: cython.ulonglong = load(shard.words, shard.header + S_STAMP)
        if request.given_up & bit(shard.number):
            return BUSY
        while status == NO_ROOM:
            try:
                status = shard.run_one(request, now, READ_PATIENCE_NS)
                if status == NO_ROOM:
                    request.make_room()
            except LockTimeout:
                waits += 1
                if waits == READ_WAITS or load(shard.words, shard.header + S_STAMP) == stamp:
                    request.given_up |= bit(shard.number)
                    return BUSY
                stamp = load(shard.words, shard.header + S_STAMP)  # they are at work: our turn will come
            except CacheClosed:
                self._refresh()
                return BUSY  # unlinked while we waited: nothing is there
        return status

    def _put(self, op: cython.int, key: object, value: object, ttl: object, version: cython.ulonglong) -> int:
        """Serialize and store; DONE, or why not."""
        request: Request = self._take()
        now: cython.ulonglong = self._now()
        status: cython.int
        request.set_key(key)
        request.set_value(value, self._codec)
        self._set_ttl(request, ttl, now)
        request.version = version
        status = self._change(request, op, now)
        if status == DONE:
            self._member.count(C_SETS, 1)
        self._give(request)
        return status

    def _change(self, request: Request, op: cython.int, now: cython.ulonglong) -> int:
        """Perform one writing operation; its status."""
        request.op = op
        request.refusals = 0
        request.status = UNDONE
        if process_epoch() == self._epoch:
            try:
                shard: Shard = shard_of(request, self._shards or self._here())
                shard.run_one(request, now, self._timeout_ns)
            except CacheClosed:
                self._refresh()
        if request.status >= UNDONE:
            self._steadily(self._run_undone, [request], now)
        if request.status >= CORRUPT:
            self._raise_for(request.status)
        return request.status

    def _make_way(self, request: Request, shards: list[Shard], now: cython.ulonglong) -> int:
        """Do what a request needs that its shard, one of `shards`, cannot do with its lock held."""
        shard: Shard
        fullest: Shard = shards[0]
        if request.status == NO_ROOM:
            return request.make_room()
        if request.status != FULL:
            return 0
        for shard in shards:
            if load(shard.words, shard.header + S_ENTRIES) > load(fullest.words, fullest.header + S_ENTRIES):
                fullest = shard
        eviction: Request = Request()
        eviction.op = OP_EVICT
        if fullest.run_one(eviction, now, self._timeout_ns) != DONE:
            # Others may have emptied it meanwhile, but not a hundred times in a row.
            request.refusals += 1
            if request.refusals > 100:
                return self._raise_for(CORRUPT)
        return 0

    def _raise_for(self, status: cython.int) -> int:
        """Raise what a status means if it is a failure."""
        failure = self._failure(status)
        if failure is not None:
            raise failure
        return 0

    def _failure(self, status: cython.int) -> Exception | None:
        """The exception for a status that is a failure."""
        if status == TOO_LARGE:
            return ValueTooLarge(
                f"the key and its value take more than the {self._max_entry:,} bytes that one of the "
                f"{self._shard_count} shard(s) holds; the value stored before, if any, is kept. Create the cache with "
                f"a larger max_bytes or fewer shards"
            )
        if status == CORRUPT:
            return contradiction()
        return None

    def _set_ttl(self, request: Request, ttl: object, now: cython.ulonglong) -> int:
        """Fill in when the entry expires."""
        span: cython.ulonglong
        if ttl is DEFAULT:
            span = self._default_ttl_ns
        elif ttl is None:
            span = 0
        else:
            span = ttl_to_ns(ttl)
        request.expiry = now + span if span else 0
        return 0


def _several(keys: Iterable[object]) -> Iterable[object]:
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"an iterable of keys was expected, not one key ({keys!r}): write [{keys!r}]")
    return keys


def _naming(key: object, error: Exception) -> Exception:
    """The same error, naming the key: one of many was given."""
    return type(error)(f"the value for the key {key!r}: {error}")


def _integer(number: object, name: str) -> int:
    if type(number) is not int:
        raise TypeError(f"{name} is an int, not {type(number).__name__} ({number!r})")
    if not is_long_long(number):
        raise OverflowError(f"{name}={number!r} does not fit 64 signed bits")
    return number
