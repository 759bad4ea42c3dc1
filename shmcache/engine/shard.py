"""One shard, the unit of locking: every operation on its entries by the owner of its lock.

Readers take no lock (`reader.py`), except after a few collisions. Writers hold it from `enter` to `leave`, and change
things in small transactions (`journal.py`), each of one entry. Names ending in `_locked` need the lock. When an
owner dies, the next one runs `recover_locked`: it rolls back the transaction, and the shard stands as before the
operation or as after it. What is in limbo stays there until somebody needs room.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from time import sleep
from typing import Any, TypeVar

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.blocks import Blocks
    from cython.cimports.shmcache.engine.eviction import Lru
    from cython.cimports.shmcache.engine.expiry import Wheel
    from cython.cimports.shmcache.engine.journal import Journal
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.lock import Lock
    from cython.cimports.shmcache.engine.membership import Member
    from cython.cimports.shmcache.engine.primitives import *
    from cython.cimports.shmcache.engine.reader import Reader
    from cython.cimports.shmcache.engine.request import Request
    from cython.cimports.shmcache.engine.table import Table
else:
    from shmcache.engine.blocks import Blocks
    from shmcache.engine.eviction import Lru
    from shmcache.engine.expiry import Wheel
    from shmcache.engine.journal import Journal
    from shmcache.engine.layout import *
    from shmcache.engine.lock import Lock
    from shmcache.engine.membership import Member
    from shmcache.engine.primitives import *
    from shmcache.engine.reader import Reader
    from shmcache.engine.request import Request
    from shmcache.engine.table import Table

from shmcache.engine.bytelock import Mutex, forked_within, release_abandoned
from shmcache.engine.layout import Geometry
from shmcache.errors import CacheClosed, LockTimeout

__all__ = ["Shard"]

Result = TypeVar("Result")


@cython.final
@cython.cclass
class Shard:
    """A part of the table with its own lock, eviction order, timer wheel and blocks."""

    def __init__(
        self,
        words: memoryview,
        data: memoryview,
        geometry: Geometry,
        number: int,
        secret: tuple[int, int],
        member: Member,
        sleeper: Any,
        guard: Any,
        inspect_locked: Callable[[Shard, bool], list[str]],
    ) -> None:
        region = geometry.region(number)
        self.number = number
        self.words = words
        self.header = region.header
        self.log = region.log
        self.slots_at = region.slots
        self.slots = geometry.slots
        self.shards = geometry.shards
        self.max_entries = geometry.max_entries
        self.share = geometry.max_entries // geometry.shards
        self.max_entry = geometry.max_entry_bytes
        self.first_header = geometry.region(0).header
        self.stride = geometry.region(1).header - self.first_header
        self.secret0, self.secret1 = secret
        self.member = member
        self.inspect_locked = inspect_locked
        self.now = 0  # when the last operation of this process began
        self.mutexes: dict[int, Mutex] = {}  # one a process: a fork may leave a locked one behind
        self.table = Table(words, region.header, region.log, region.buckets, region.slots, geometry.slots)
        self.blocks = Blocks(words, data, region.header, region.log, region.bins, region.blocks, geometry.blocks)
        self.order = Lru(words, region.header, region.log, region.slots, geometry.slots)
        self.wheel = Wheel(words, region.header, region.log, region.wheel, region.slots, geometry.slots)
        self.lock = Lock(words, region.header, member, sleeper, guard)
        self.journal = Journal(words, region.header, region.log, region.slots, geometry.slots, region.bins, region.end)
        self.reader = Reader(
            words,
            region.header,
            region.slots,
            geometry.slots,
            geometry.max_entry_bytes,
            self.table,
            self.blocks,
            member,
        )

    def at(self, slot: cython.ulonglong) -> int:
        """The word index of a slot."""
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def promote(self, request: Request) -> int:
        """Record a hit in the eviction order, unless somebody else has the lock: recency is not worth waiting for."""
        self.now = request.now
        if cython.compiled:
            if self.lock.try_acquire():
                if not self.is_dirty():  # recovery is left to a writer
                    self.record_hit_locked(request)
                self.leave()
        elif not self.mutex().lock.locked():
            self.alone(self.try_record_hit, request)
        return 0

    def try_record_hit(self, request: Request) -> None:
        with suppress(CacheClosed):  # and then there is nothing to record
            if self.lock.try_acquire() and not self.is_dirty():
                self.record_hit_locked(request)

    def record_hit_locked(self, request: Request) -> None:
        if load(self.words, self.at(request.slot) + E_VERSION) == request.version and low(
            load(self.words, self.at(request.slot) + E_PLACE)
        ):
            self.order.on_hit(request.slot)
            self.journal.commit_order()

    # --- the section ------------------------------------------------------------------------------------------------
    def run(
        self, requests: list[Request], start: cython.int, now: cython.ulonglong, timeout_ns: cython.ulonglong
    ) -> int:
        """Take the lock once and perform the requests from number `start` on, each of them a transaction.

        The number of the first that is not done: because something must be done without the lock first (its status is
        NO_ROOM or FULL), or because others have waited long enough. Raises LockTimeout.
        """
        self.now = now
        if cython.compiled:
            self.enter(timeout_ns)
            start = self.run_locked(requests, start, now)
            self.leave()
        else:
            start = self.alone(self.enter_and, timeout_ns, self.run_locked, requests, start, now)
        return start

    def run_locked(self, requests: list[Request], start: cython.int, now: cython.ulonglong) -> int:
        number: cython.int
        request: Request
        end: cython.int = min(len(requests), start + RUN_BATCH)
        for number in range(start, end):
            request = requests[number]
            request.status = self.perform_locked(request, now)
            if request.status >= NO_ROOM:
                return number
        return end

    def inspect(self, rebuild: bool, now: cython.ulonglong, timeout_ns: cython.ulonglong) -> list[str]:
        """Take the lock, then check or rebuild (`repair.py`); what was found wrong or dropped."""
        self.now = now
        if cython.compiled:
            self.enter(timeout_ns)
            try:
                return self.drain_and_inspect_locked(rebuild)
            finally:
                self.leave()
        return self.alone(self.enter_and, timeout_ns, self.drain_and_inspect_locked, rebuild)

    def drain_and_inspect_locked(self, rebuild: bool) -> list[str]:
        self.blocks.drain()  # so that every block is free or an entry's
        return self.inspect_locked(self, rebuild)

    def run_one(self, request: Request, now: cython.ulonglong, timeout_ns: cython.ulonglong) -> int:
        """Take the lock and perform one request; its status. Raises LockTimeout."""
        self.now = now
        if cython.compiled:
            self.enter(timeout_ns)
            request.status = self.perform_locked(request, now)
            self.leave()
        else:
            self.run([request], 0, now, timeout_ns)
        return request.status

    def alone(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Uncompiled: do `work` with the mutex, and leave whatever it entered, whether it ended or was interrupted.

        Python code can be interrupted anywhere: `leave` rolls back what was not finished.
        """
        epoch = process_epoch()
        mutex = self.mutex()
        mutex.refuse_reentry()
        try:
            with mutex.lock:
                try:
                    try:
                        mutex.owner = get_ident()
                        return work(*arguments)
                    finally:
                        self.leave()
                finally:
                    self.leave()  # a signal handler that raised may have interrupted the first
                    mutex.owner = 0
        except (ValueError, RuntimeError):
            if process_epoch() != epoch:
                raise forked_within() from None  # `attachment.py` released the views, or the mutex
            raise

    def enter_and(self, timeout_ns: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Take the lock, then do `work`."""
        self.enter(timeout_ns)
        return work(*arguments)

    def enter(self, timeout_ns: cython.ulonglong) -> int:
        """Take the lock, and bring the shard in order if the owner before died."""
        if not cython.compiled and self.member.owner and load(self.words, self.header + S_LOCK) == self.member.owner:
            self.recover_locked()  # the mutex is ours, so this is what an interrupted `leave` of this process left
            return 0
        if not self.lock.acquire(timeout_ns):
            raise LockTimeout(
                f"the lock of a shard could not be had for {timeout_ns / 1e9} s (lock_timeout): "
                f"{self.lock.why_refused()}"
            )
        if self.is_dirty():
            try:
                self.recover_locked()
            except BaseException:  # a rebuild may lack memory: the next owner tries again
                self.lock.release()
                raise
        return 0

    def leave(self) -> int:
        """Give the lock back."""
        if not cython.compiled:
            # Without a line of the process table, nothing is ours: another thread closed the cache, or a signal
            # handler forked here and this is the child.
            if not self.member.owner or load(self.words, self.header + S_LOCK) != self.member.owner:
                return 0
            if self.is_dirty():
                self.recover_locked()
        return self.lock.release()

    def wait_for_own_thread(self) -> None:
        """Uncompiled: return once no thread of this process holds the lock; LockTimeout if it is this very thread.

        No thread takes it any more, but one may have the mutex for as long as it waits for another process.
        """
        while load(self.words, self.header + S_LOCK) == self.member.owner and self.mutex().lock.locked():
            self.mutex().refuse_reentry()
            sleep(0.0005)

    def mutex(self) -> Any:
        """What excludes the threads of this process, uncompiled; compiled code keeps the GIL instead."""
        return self.mutexes.setdefault(process_epoch(), Mutex())

    def after_fork(self) -> None:
        """In a forked child: wait for no thread of the parent."""
        release_abandoned(self.mutexes.values())

    def is_entered(self) -> bool:
        """Uncompiled: whether this thread has the mutex; in a forked child, whether it had when it forked."""
        return any(mutex.is_mine() for mutex in list(self.mutexes.values()))

    # --- operations -------------------------------------------------------------------------------------------------
    def perform_locked(self, request: Request, now: cython.ulonglong) -> int:
        """Perform one request; how it ended."""
        found: cython.ulonglong
        expiry: cython.ulonglong
        op: cython.int = request.op
        status: cython.int
        if op == OP_CLEAR:
            return self.clear_locked()
        if op == OP_PURGE:
            return self.purge_locked(request, now)
        if op == OP_EVICT:
            return DONE if self.evict_locked(now) else ABSENT
        if op == OP_READ:
            status = self.reader.read_once(request, now)
            if status == DONE:
                self.record_hit_locked(request)
            return status
        if op == OP_READ_SLOT:
            return self.reader.read_slot(request, request.slot, now)
        self.expire_locked(now, SWEEP)
        found = self.find_locked(request)
        if found:
            expiry = load(self.words, self.at(found - 1) + E_EXPIRY)
            if expiry and expiry <= now:
                if self.remove_locked(found - 1) != DONE:
                    return CORRUPT
                self.count_locked(S_EXPIRATIONS)
                found = 0
        if op == OP_ADD and found:
            return PRESENT
        if op == OP_INCR:
            return self.incr_locked(request, found, now)
        if not found and op >= OP_REPLACE:
            return ABSENT
        if (op == OP_CAS or op == OP_DELETE_VERSION) and (
            load(self.words, self.at(found - 1) + E_VERSION) != request.version
        ):
            return CONFLICT
        if op == OP_DELETE or op == OP_DELETE_VERSION:
            return self.remove_locked(found - 1)
        if op == OP_TOUCH:
            return self.touch_locked(request, found - 1)
        return self.put_locked(request, found, now)

    def find_locked(self, request: Request) -> int:
        """The slot of the request's key plus 1, expired or not; 0 if there is none."""
        link: cython.ulonglong = load(self.words, self.table.bucket_of(request.hash))
        tag: cython.ulonglong = high(request.hash)
        steps: cython.ulonglong = 0
        word: cython.ulonglong
        run: cython.ulonglong
        while link and steps <= self.slots:
            word = self.at(low(link) - 1)
            if high(link) == tag and load(self.words, word + E_HASH) == request.hash:
                run = low(load(self.words, word + E_PLACE))
                if (
                    run
                    and high(load(self.words, word + E_SIZES)) == (request.key_size | request.key_kind << 16)
                    and self.blocks.matches(run - 1, request.key, request.key_size)
                ):
                    return low(link) if low(link) <= self.slots else 0
            link = load(self.words, word + E_CHAIN)
            steps += 1
        return 0

    def put_locked(self, request: Request, found: cython.ulonglong, now: cython.ulonglong) -> int:
        """Store the request's value: in the slot `found - 1`, or a new one if 0. Evicts as far as needed."""
        size: cython.ulonglong = request.key_size + request.head_size + request.body_size
        length: cython.ulonglong = (size + RUN_HEADER_BYTES + BLOCK_BYTES - 1) // BLOCK_BYTES  # of a single run
        blocks: cython.ulonglong = length  # that have to be free
        missing: cython.ulonglong
        victim: cython.ulonglong
        entries: cython.ulonglong
        if size > self.max_entry:
            return TOO_LARGE
        if found:
            self.order.on_hit(found - 1)  # the entry being replaced shall be the last to be evicted for it
            self.journal.commit_order()
        else:
            while self.is_full_locked():
                entries = load(self.words, self.header + S_ENTRIES)
                if entries > self.slots:
                    return CORRUPT
                if entries == 0 or entries * 2 < self.share:
                    return FULL
                if not self.evict_locked(now):
                    return CORRUPT
        while not self.blocks.has_spare(length):
            self.blocks.drain()
            if blocks > self.blocks.count or load(self.words, self.header + S_FREE_BLOCKS) > self.blocks.count:
                return CORRUPT  # it cannot take more than there are
            if load(self.words, self.header + S_FREE_BLOCKS) < blocks:
                victim = self.evict_locked(now)
                if not victim:
                    return CORRUPT
                if victim == found:
                    found = 0
            elif self.blocks.reserve(size):
                break
            else:
                # So many pieces that their headers took the room: give them back and free that much more.
                missing = (size - self.blocks.reserved) // BLOCK_BYTES + 1
                self.blocks.drain()
                blocks = load(self.words, self.header + S_FREE_BLOCKS) + missing
        self.write_entry(request)
        if found:
            return self.overwrite_locked(request, found - 1)
        return self.insert_locked(request)

    def write_entry(self, request: Request) -> None:
        """Write key and value into limbo, where nobody looks."""
        run: cython.ulonglong = load(self.words, self.header + S_LIMBO) - 1
        head: cython.p_uchar = pointer(request.small, HEAD_AT, request.head_size)
        start: cython.ulonglong = request.key_size + request.head_size
        at: cython.ulonglong = self.blocks.place_of(run, start + request.body_size)
        if at:  # nearly always
            copy_in(self.blocks.data, at, request.key, request.key_size)
            copy_in(self.blocks.data, at + request.key_size, head, request.head_size)
            copy_in(self.blocks.data, at + start, request.body, request.body_size)
        else:
            self.blocks.write(run, 0, request.key, request.key_size)
            self.blocks.write(run, request.key_size, head, request.head_size)
            self.blocks.write(run, start, request.body, request.body_size)
        fence_release()

    def insert_locked(self, request: Request) -> int:
        """Give what is in limbo a slot."""
        slot: cython.ulonglong = load(self.words, self.header + S_FREE_SLOT)
        word: cython.ulonglong
        if not slot or slot > self.slots:
            return CORRUPT
        slot -= 1
        word = self.at(slot)
        self.journal.begin(slot)
        self.table.take_free()
        logged_store(self.words, self.log, word + E_HASH, request.hash)
        logged_store(self.words, self.log, word + E_EXPIRY, request.expiry)
        self.fill_slot(request, slot)
        logged_store(self.words, self.log, self.header + S_LIMBO, 0)
        self.table.link(slot, request.hash)
        self.order.on_insert(slot)
        if request.expiry:
            self.wheel.on_insert(slot)
        self.journal.add(S_ENTRIES, 1)
        self.journal.add(S_USED_BYTES, request.key_size + request.head_size + request.body_size)
        self.journal.commit(slot)
        self.peak_locked()
        return DONE

    def overwrite_locked(self, request: Request, slot: cython.ulonglong) -> int:
        """Swap what is in limbo with what the slot has, which then is freed or waits there."""
        word: cython.ulonglong = self.at(slot)
        before: cython.ulonglong = low(load(self.words, word + E_PLACE))
        size: cython.ulonglong = request.key_size + low(load(self.words, word + E_SIZES))
        self.journal.begin(slot)
        if not request.keep_expiry:
            self.set_expiry(request, slot)
        self.fill_slot(request, slot)
        logged_store(self.words, self.log, self.header + S_LIMBO, before)
        self.journal.add(S_USED_BYTES, wrap(request.key_size + request.head_size + request.body_size - size))
        self.journal.commit(slot)
        self.peak_locked()
        self.blocks.settle()
        return DONE

    def touch_locked(self, request: Request, slot: cython.ulonglong) -> int:
        """Give the slot the request's expiry."""
        self.journal.begin(slot)
        self.set_expiry(request, slot)
        self.order.on_hit(slot)
        self.journal.commit(slot)
        return DONE

    def set_expiry(self, request: Request, slot: cython.ulonglong) -> None:
        word: cython.ulonglong = self.at(slot) + E_EXPIRY
        if load(self.words, word):
            self.wheel.on_remove(slot)
        logged_store(self.words, self.log, word, request.expiry)
        if request.expiry:
            self.wheel.on_insert(slot)

    def fill_slot(self, request: Request, slot: cython.ulonglong) -> None:
        """Make the slot own the chain in limbo."""
        word: cython.ulonglong = self.at(slot)
        place: cython.ulonglong = load(self.words, word + E_PLACE)
        logged_store(
            self.words,
            self.log,
            word + E_SIZES,
            pack(request.key_size | request.key_kind << 16, request.head_size + request.body_size),
        )
        logged_store(self.words, self.log, word + E_PLACE, with_low(place, load(self.words, self.header + S_LIMBO)))

    def remove_locked(self, slot: cython.ulonglong) -> int:
        """Take an entry out; what it leaves is freed, or waits in limbo if it is one short run."""
        word: cython.ulonglong = self.at(slot)
        sizes: cython.ulonglong = load(self.words, word + E_SIZES)
        sequence: cython.ulonglong = load(self.words, self.header + S_SEQUENCE)
        if not low(load(self.words, word + E_PLACE)):
            return CORRUPT  # so every removal makes a used slot a free one, and no number of them is endless
        self.blocks.drain()
        store(self.words, self.header + S_SEQUENCE, sequence | 1)
        self.journal.begin(slot)
        if not self.table.unlink(slot):
            self.journal.roll_back()
            return CORRUPT
        self.order.on_remove(slot)
        if load(self.words, word + E_EXPIRY):
            self.wheel.on_remove(slot)
        logged_store(self.words, self.log, self.header + S_LIMBO, low(load(self.words, word + E_PLACE)))
        self.table.give_free(slot)
        self.journal.add(S_ENTRIES, wrap(-1))
        self.journal.add(S_USED_BYTES, wrap(0 - (high(sizes) & 0xFFFF) - low(sizes)))
        self.journal.commit(slot)
        store_release(self.words, self.header + S_SEQUENCE, (sequence | 1) + 1)
        self.blocks.settle()
        return DONE

    def evict_locked(self, now: cython.ulonglong) -> int:
        """Remove an expired entry if one is found, otherwise the policy's victim; its slot plus 1, 0 for none."""
        slot: cython.ulonglong = self.wheel.next_expired(now, EVICTION_SWEEP)
        counter: cython.ulonglong = S_EXPIRATIONS
        if not slot:
            slot = self.order.victim()
            counter = S_EVICTIONS
        if not slot or self.remove_locked(slot - 1) != DONE:
            return 0
        self.count_locked(counter)
        return slot

    def expire_locked(self, now: cython.ulonglong, budget: cython.ulonglong) -> int:
        """Remove expired entries, looking at no more than `budget` for each; how many."""
        slot: cython.ulonglong
        removed: cython.int = 0
        while removed < cython.cast(cython.int, budget):
            slot = self.wheel.next_expired(now, budget)
            if not slot or self.remove_locked(slot - 1) != DONE:
                break
            self.count_locked(S_EXPIRATIONS)
            removed += 1
        return removed

    def purge_locked(self, request: Request, now: cython.ulonglong) -> int:
        """Remove up to PURGE_BATCH expired entries, their number in `request.number`; BUSY if there may be more."""
        slot: cython.ulonglong
        after: cython.ulonglong = 0
        request.number = 0
        while request.number < PURGE_BATCH:
            slot = self.wheel.next_due(now, self.slots + WHEEL_LISTS)
            if not slot:
                # The list of this second, each entry of it once: `after` is where the search goes on.
                if request.number and after == ENDED:
                    return DONE
                slot = self.wheel.scan_current(now, self.slots + 1, after)
                if not slot:
                    return DONE
                after = high(load(self.words, self.at(slot - 1) + E_TIMER))
                if not after:
                    after = ENDED
            if self.remove_locked(slot - 1) != DONE:
                return CORRUPT
            self.count_locked(S_EXPIRATIONS)
            request.number += 1
        return BUSY

    def incr_locked(self, request: Request, found: cython.ulonglong, now: cython.ulonglong) -> int:
        """Add `request.number` to the stored integer, or to `request.initial`; the sum is left in `request.number`."""
        total: cython.longlong
        status: cython.int
        if found:
            status = self.number_locked(request, found - 1)
            if status != DONE:
                return status
            request.expiry = load(self.words, self.at(found - 1) + E_EXPIRY)
        elif not request.has_initial:
            return ABSENT
        if add_overflows(request.initial, request.number):
            return OUT_OF_RANGE
        total = request.initial + request.number
        request.head_size = write_number(request.small, HEAD_AT, 0xD3, wrap(total), 8)  # msgpack's int 64
        request.body_size = 0
        request.keep_expiry = True
        status = self.put_locked(request, found, now)
        if status == DONE:  # a request that is FULL comes again
            request.number = total
        return status

    def number_locked(self, request: Request, slot: cython.ulonglong) -> int:
        """Put the slot's value into `request.initial`: DONE, NOT_A_NUMBER, or OUT_OF_RANGE of 64 signed bits."""
        size: cython.ulonglong = low(load(self.words, self.at(slot) + E_SIZES))
        run: cython.ulonglong = low(load(self.words, self.at(slot) + E_PLACE)) - 1
        mark: cython.ulonglong
        number: cython.ulonglong
        bits: cython.ulonglong
        if not self.blocks.read(run, request.key_size, request.small_memory, HEAD_AT, min(size, 9)):
            return NOT_A_NUMBER
        mark = read_number(request.small, HEAD_AT, 1)
        if size == 1 and (mark < 0x80 or mark >= 0xE0):  # the small integers of msgpack
            request.initial = as_signed(mark if mark < 0x80 else wrap(mark - 256))
            return DONE
        if 0xC7 <= mark <= 0xC9 or 0xD4 <= mark <= 0xD8:  # an extension
            number = 1 if mark >= 0xD4 else 1 + (1 << (mark - 0xC7))
            return OUT_OF_RANGE if read_number(request.small, HEAD_AT + number, 1) == BIG_INT else NOT_A_NUMBER
        if mark < 0xCC or mark > 0xD3:
            return NOT_A_NUMBER
        if size != 1 + bit((mark - 0xCC) & 3):
            return NOT_A_NUMBER
        number = read_number(request.small, HEAD_AT + 1, size - 1)
        bits = (size - 1) * 8
        if mark == 0xCF and number >> 63:
            return OUT_OF_RANGE
        if mark >= 0xD0 and bits < 64 and number >> (bits - 1):
            number = wrap(number - bit(bits))
        request.initial = as_signed(number)
        return DONE

    def is_full_locked(self) -> bool:
        """Whether a new entry needs another one to go first."""
        shard: cython.ulonglong
        total: cython.ulonglong = 0
        if not load(self.words, self.header + S_FREE_SLOT):
            return True
        if self.shards == 1:
            return False
        for shard in range(self.shards):
            total += load(self.words, self.first_header + shard * self.stride + S_ENTRIES)
        return total >= self.max_entries

    def count_locked(self, field: cython.ulonglong) -> None:
        """Count something in the header; a statistic, not part of the transaction."""
        word: cython.ulonglong = self.header + field
        store(self.words, word, load(self.words, word) + 1)

    def peak_locked(self) -> None:
        entries: cython.ulonglong = load(self.words, self.header + S_ENTRIES)
        used: cython.ulonglong = load(self.words, self.header + S_USED_BYTES)
        if entries > load(self.words, self.header + S_PEAK_ENTRIES):
            store(self.words, self.header + S_PEAK_ENTRIES, entries)
        if used > load(self.words, self.header + S_PEAK_BYTES):
            store(self.words, self.header + S_PEAK_BYTES, used)

    # --- emptying ---------------------------------------------------------------------------------------------------
    def clear_locked(self) -> int:
        """Remove every entry. The state word is the commit: whoever gets the lock after a death finishes the work."""
        store(self.words, self.header + S_SEQUENCE, load(self.words, self.header + S_SEQUENCE) | 1)
        store(self.words, self.header + S_STATE, STATE_CLEARING)
        self.format_locked()
        return DONE

    def format_locked(self) -> None:
        """Make the shard empty, whatever it holds."""
        number: cython.ulonglong
        store(self.words, self.log + L_USED, 0)
        fence_release()
        self.table.format_free()
        self.blocks.format_free()
        for number in range(WHEEL_LISTS):
            store(self.words, self.wheel.lists + number, 0)
        store(self.words, self.header + S_ORDER, 0)
        store(self.words, self.header + S_ENTRIES, 0)
        store(self.words, self.header + S_USED_BYTES, 0)
        store(self.words, self.header + S_HAND, 0)
        store_release(self.words, self.header + S_STATE, STATE_READY)
        store_release(self.words, self.header + S_SEQUENCE, (load(self.words, self.header + S_SEQUENCE) | 1) + 1)

    def format(self, stamp: cython.ulonglong) -> None:
        """Lay out a new shard, before anybody else can see it. Versions begin after `stamp`, an even number.

        Each cache should begin elsewhere: after an unlink, `cas` must not take a version of the old one for one of the
        new one.
        """
        store(self.words, self.header + S_STAMP, stamp)
        store(self.words, self.header + S_STATE, STATE_CLEARING)
        self.format_locked()

    # --- recovery ---------------------------------------------------------------------------------------------------
    def is_dirty(self) -> bool:
        """Whether the last owner of the lock left something unfinished."""
        return (
            load(self.words, self.header + S_SUBJECT)
            | load(self.words, self.header + S_STATE)
            | load(self.words, self.log + L_USED)
            | (load(self.words, self.header + S_SEQUENCE) & 1)
        ) != 0

    def recover_locked(self) -> int:
        """Undo what a dead owner began and finish what it had committed. May die itself: the next one starts over."""
        state: cython.ulonglong = load(self.words, self.header + S_STATE)
        if state == STATE_READY:
            self.journal.roll_back()
        elif state == STATE_CLEARING:
            self.format_locked()
        else:
            self.inspect_locked(self, True)
        return 0
