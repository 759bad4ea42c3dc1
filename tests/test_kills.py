"""Processes killed with SIGKILL, or stopped, at any instant: nobody hangs, nothing that was stored is lost.

The workers of a storm keep a ledger in memory that outlives them: what they are about to do, and what they have done.
So after a death it is known, key by key, which values may be there: the one that was acknowledged or the one that was
being written, and no other.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmcache import Cache, LockTimeout, is_compiled
from shmcache.engine import layout
from tests.processes import Family, Gate, no_gc, until

COMPILED = is_compiled()

WORKERS = 3
KEYS = 24  # of each worker
COUNTERS = 4  # how many of these are numbers for `incr`
LARGEST = 64 * 1024 if COMPILED else 4096
STALL = 0.05  # seconds after a kill within which the others work on: 99 of 100 times, the rest is the machine's
LONGEST_STALL = 1.0  # seconds, always
LONGEST_WAIT = 0.003 if COMPILED else 0.02  # seconds between two kills
GONE = object()

_POOL = random.Random(1).randbytes(2 * LARGEST)
_HEAD = struct.Struct("<IIII")


# --- values that describe themselves --------------------------------------------------------------------------------
def make(worker: int, key: int, sequence: int) -> Any:
    """The value that a key of a worker has after its change number `sequence`. No two of 16 bytes or more are alike."""
    if key < COUNTERS:
        return sequence
    mixed = zlib.crc32(_HEAD.pack(worker, key, sequence, 0))
    size = 1 << mixed % LARGEST.bit_length()  # small and large ones are equally likely
    size += (mixed >> 8) % size
    start = (mixed >> 4) % LARGEST
    body = _POOL[start : start + max(0, min(size, LARGEST) - _HEAD.size)]
    value = (_HEAD.pack(worker, key, sequence, zlib.crc32(body)) + body)[:size]
    return [sequence, value] if sequence % 5 == 0 else value


def is_sound(worker: int, key: int, value: Any) -> bool:
    """Whether a value is one that this key had at some time, whole."""
    if key < COUNTERS:
        return isinstance(value, int) and value > 0
    data = value[1] if isinstance(value, list) else value
    if len(data) < _HEAD.size:
        return True  # too short to tell
    whose, which, sequence, _ = _HEAD.unpack_from(data)
    return (whose, which) == (worker, key) and bool(make(worker, key, sequence) == value)


def key_name(worker: int, key: int) -> str:
    return f"worker {worker} key {key}"


# --- the ledger -----------------------------------------------------------------------------------------------------
class Ledger:
    """Memory that the workers of one storm share with the test. A store of a word is what makes a fact.

    Every worker has: the number of intended changes, its longest operation in ns, operations done, whether it is to
    stop, additions to the shared counter done; then the sequence number of each key (0: absent); then (key, sequence)
    for each intended change.
    """

    INTENDED, STALL, DONE, STOP, ADDED = range(5)
    STATE = 8
    INTENTS = STATE + KEYS
    SHARED = KEYS  # as the key of an intent: an addition to the counter that all workers share
    SIZE = INTENTS + 2 * 2 * (KEYS + 1)

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, WORKERS * self.SIZE * 8)).cast("Q")

    def word(self, worker: int, which: int) -> int:
        return self.memory[worker * self.SIZE + which]

    def put(self, worker: int, which: int, value: int) -> None:
        self.memory[worker * self.SIZE + which] = value

    def state(self, worker: int, key: int) -> int:
        return self.word(worker, self.STATE + key)

    def intend(self, worker: int, *steps: dict[int, int]) -> None:
        """Before an operation: what each of its steps will make of which keys."""
        intents = [change for changes in steps for change in changes.items()]
        for position, (key, sequence) in enumerate(intents):
            self.put(worker, self.INTENTS + 2 * position, key)
            self.put(worker, self.INTENTS + 2 * position + 1, sequence)
        self.put(worker, self.INTENDED, len(intents))

    def acknowledge(self, worker: int, changes: dict[int, int]) -> None:
        """After it: so it is."""
        for key, sequence in changes.items():
            if key == self.SHARED:
                self.put(worker, self.ADDED, self.word(worker, self.ADDED) + 1)
            else:
                self.put(worker, self.STATE + key, sequence)
        self.put(worker, self.INTENDED, 0)

    def intents(self, worker: int) -> list[tuple[int, int]]:
        count = self.word(worker, self.INTENDED)
        words = [self.word(worker, self.INTENTS + position) for position in range(2 * count)]
        return list(zip(words[::2], words[1::2], strict=True))

    def settle(self, worker: int, key: int, sequence: int) -> None:
        """After a death: this is what it came to."""
        self.put(worker, self.STATE + key, sequence)


# --- the workers ----------------------------------------------------------------------------------------------------
class Worker:
    """Changes its own keys in every way there is, and looks at those of the others, until told to stop."""

    def __init__(self, cache: Cache, ledger: Ledger, number: int, seed: str) -> None:
        self.cache = cache
        self.ledger = ledger
        self.number = number
        self.rng = random.Random(seed)
        self.names = [key_name(number, key) for key in range(KEYS)]
        self.sequence = 1 + max(ledger.state(number, key) for key in range(COUNTERS, KEYS))
        self.burst = dict.fromkeys(range(COUNTERS, KEYS), self.sequence)
        self.burst_values = self.values_of(self.burst)

    def values_of(self, changes: dict[int, int]) -> dict[str, Any]:
        return {self.names[key]: make(self.number, key, sequence) for key, sequence in changes.items()}

    def state(self, key: int) -> int:
        return self.ledger.state(self.number, key)

    def run(self) -> None:
        ledger, number = self.ledger, self.number
        while not ledger.word(number, ledger.STOP):
            self.sequence += 1
            steps, operation, expected = self.choose(self.rng.randrange(20))
            ledger.intend(number, *steps)
            began = time.perf_counter_ns()
            answer = operation()
            took = time.perf_counter_ns() - began
            ledger.acknowledge(number, steps[-1])
            assert answer == expected, f"{operation} of worker {number}: {answer!r:.200}, expected {expected!r:.200}"
            ledger.put(number, ledger.STALL, max(took, ledger.word(number, ledger.STALL)))
            ledger.put(number, ledger.DONE, ledger.word(number, ledger.DONE) + 1)

            other, key = self.rng.randrange(WORKERS), self.rng.randrange(KEYS)
            found = self.cache.get(key_name(other, key), GONE)
            assert found is GONE or is_sound(other, key, found), f"{key_name(other, key)}: {found!r:.200}"

    def choose(self, choice: int) -> tuple[list[dict[int, int]], Callable[[], object], object]:
        """What to do next: what each of its steps makes of which keys, how it is done, and what it has to answer."""
        cache, rng, sequence = self.cache, self.rng, self.sequence
        key = rng.randrange(COUNTERS, KEYS)
        name, now = self.names[key], self.state(key)
        value = make(self.number, key, sequence)
        old_value = make(self.number, key, now) if now else None
        several = dict.fromkeys(rng.sample(range(COUNTERS, KEYS), rng.randint(2, 5)), sequence)
        values = self.values_of(several)
        ttl = rng.choice((None, 1000))
        counter = rng.randrange(COUNTERS)
        by = rng.randint(1, 9)
        total = self.state(counter) + by
        to_set, to_delete, to_count = {key: sequence}, {key: 0}, {counter: total}
        match choice:
            case 0:
                return [to_delete], lambda: cache.delete(name), now != 0
            case 1:
                return (
                    [dict.fromkeys(several, 0)],
                    lambda: cache.delete_many(values),
                    sum(map(bool, map(self.state, several))),
                )
            case 2:
                return [{} if now else to_set], lambda: cache.add(name, value, ttl), not now
            case 3:
                return [to_set if now else {}], lambda: cache.replace(name, value, ttl), now != 0
            case 4:
                return [{}], lambda: cache.touch(name, ttl), now != 0
            case 5:
                return [to_count], lambda: cache.incr(self.names[counter], by, initial=0), total
            case 6:
                return [{self.ledger.SHARED: 1}], lambda: cache.incr("shared", initial=0) > 0, True
            case 7:
                return [to_delete], lambda: cache.pop(name, None), old_value
            case 8:
                return [to_set], lambda: cache.cas(name, value, cache.gets(name)[1]), True
            case 9:
                return (
                    [{**several, **to_count}],
                    lambda: self.in_a_batch(values, counter, by),
                    [True] * len(several) + [total],
                )
            case 10:
                present = {each: self.state(each) for each in several if self.state(each)}
                return [{}], lambda: cache.get_many(values), self.values_of(present)
            case 11:
                return [{}], lambda: cache.get(name), old_value
            case 12:
                return [several], lambda: cache.set_many(values, ttl), None
            case 13 | 14 | 15:
                return [to_set], lambda: cache.set(name, value, ttl), None
            case _:
                return [dict.fromkeys(self.burst, 0), self.burst], self.in_a_burst, None

    def in_a_batch(self, values: dict[str, Any], counter: int, by: int) -> list[Any]:
        with self.cache.batch() as batch:
            pending = [batch.set(name, value) for name, value in values.items()]
            pending.append(batch.incr(self.names[counter], by, initial=0))
        return [each.value for each in pending]

    def in_a_burst(self) -> None:
        """Little but the engine runs here, so this is where most kills strike."""
        for _ in range(8 if COMPILED else 1):
            self.cache.delete_many(self.burst_values)
            self.cache.set_many(self.burst_values)


def work(cache: Cache, ledger: Ledger, number: int, seed: str) -> None:
    Worker(cache, ledger, number, seed).run()


def value_after_death(cache: Cache, ledger: Ledger, worker: int, key: int) -> int:
    """The sequence number of the value that a dead worker's key has. Fails unless it is one of those it may have."""
    found = cache.get(key_name(worker, key), GONE)
    allowed = [ledger.state(worker, key)]
    allowed += [sequence for each, sequence in ledger.intents(worker) if each == key]
    for sequence in allowed:
        if found == make(worker, key, sequence) if sequence else found is GONE:
            return sequence
    raise AssertionError(f"{key_name(worker, key)} should be one of changes {allowed}, but is {found!r:.200}")


# --- figures --------------------------------------------------------------------------------------------------------
def milliseconds(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"p50 {p50 * 1e3:.2f}, p99 {p99 * 1e3:.2f}, max {ordered[-1] * 1e3:.2f} ms"


@pytest.fixture(autouse=True)
def cheap_forks() -> Iterator[None]:
    with no_gc():
        yield


@pytest.fixture
def seed() -> str:
    """Another one in each run, and printed: the same seed gives the same operations, though not the same instants."""
    return os.environ.get("SHMCACHE_SEED") or str(random.SystemRandom().getrandbits(32))


# --- storms ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shards", "kills"), [(1, 700 if COMPILED else 80), (4, 300 if COMPILED else 40)])
def test_no_kill_loses_a_committed_entry(
    make_cache: Callable[..., Cache], show: Callable[[str], None], seed: str, shards: int, kills: int
) -> None:
    print("SHMCACHE_SEED", seed)
    cache = make_cache(max_bytes=64 * 1024 * 1024 if COMPILED else 4 * 1024 * 1024, max_entries=2048, shards=shards)
    per_shard = one_key_of_each_shard(cache)
    ledger = Ledger()
    rng = random.Random(seed)
    survivors: list[float] = []
    operations: list[float] = []
    unsure = 0
    began = time.perf_counter()
    with Family() as family:
        workers = [family.fork(work, cache, ledger, worker, f"{seed}-{worker}") for worker in range(WORKERS)]
        for number in range(kills):
            time.sleep(rng.random() * LONGEST_WAIT)
            victim = rng.randrange(WORKERS)
            workers[victim].signal(signal.SIGKILL)

            struck = time.perf_counter()
            for name in per_shard:
                cache.set(name, number)
            survivors.append(time.perf_counter() - struck)

            assert workers[victim].wait() == -signal.SIGKILL, "the worker had ended by itself"
            assert [cache.get(name) for name in per_shard] == [number] * shards
            assert cache.check() == []
            unsure += (ledger.SHARED, 1) in ledger.intents(victim)
            for key in range(KEYS):
                ledger.settle(victim, key, value_after_death(cache, ledger, victim, key))
            ledger.put(victim, ledger.INTENDED, 0)
            for worker in range(WORKERS):
                if worker != victim:
                    operations.append(ledger.word(worker, ledger.STALL) / 1e9)
                ledger.put(worker, ledger.STALL, 0)
            workers[victim] = family.fork(work, cache, ledger, victim, f"{seed}-{victim}-{number}")
        for worker in range(WORKERS):
            ledger.put(worker, ledger.STOP, 1)
        assert [worker.wait() for worker in workers] == [0] * WORKERS

    for worker in range(WORKERS):
        assert not ledger.intents(worker)
        for key in range(KEYS):
            value_after_death(cache, ledger, worker, key)
    added = sum(ledger.word(worker, ledger.ADDED) for worker in range(WORKERS))
    assert added <= cache.get("shared", 0) <= added + unsure
    stats = cache.stats()
    assert stats.evictions == stats.expirations == 0, "the cache was meant to be large enough"
    assert stats.processes == 1
    assert stats.recoveries > 0, "no kill ever hit a process that held a lock"
    done = sum(ledger.word(worker, ledger.DONE) for worker in range(WORKERS))
    show(
        f"{kills} kills in {time.perf_counter() - began:.1f} s, {stats.recoveries} of lock holders, {done:,} operations"
        f"\n    a survivor's next operation, per kill: {milliseconds(survivors)}"
        f"\n    the other workers' longest operation, per kill: {milliseconds(operations)}"
    )
    assert max(survivors) < LONGEST_STALL
    if COMPILED:
        assert sorted(survivors)[len(survivors) * 99 // 100] < STALL


def one_key_of_each_shard(cache: Cache) -> list[str]:
    found: dict[int, str] = {}
    number = 0
    while len(found) < cache.stats().shards:
        key = f"survivor {number}"
        cache.set(key, -1)
        shard = cache.info(key).shard
        if shard in found:
            cache.delete(key)
        else:
            found[shard] = key
        number += 1
    return [found[shard] for shard in sorted(found)]


def crowd(cache: Cache, ledger: Ledger, worker: int, seed: str) -> None:
    """All workers change the same keys, with far too little room, and empty the cache now and then."""
    rng = random.Random(seed)
    burst = {key_name(0, key): make(0, key, 7) for key in range(COUNTERS, 60)}
    while not ledger.word(worker, ledger.STOP):
        key = rng.randrange(COUNTERS, 200)
        name = key_name(0, key)
        value = make(0, key, rng.randrange(1, 1 << 31))
        choice = rng.randrange(100)
        began = time.perf_counter_ns()
        if choice < 40:
            cache.set(name, value, rng.choice((None, 1000, 0.002)))
        elif choice < 50:
            for _ in range(4 if COMPILED else 1):
                cache.set_many(burst)
        elif choice < 58:
            cache.delete(name)
        elif choice < 66:
            cache.add(name, value)
        elif choice < 70:
            cache.replace(name, value)
        elif choice < 76:
            cache.touch(name, rng.choice((None, 0.002)))
        elif choice < 82:
            assert cache.incr(key_name(0, key % COUNTERS), initial=0) > 0
        elif choice < 90:
            with cache.batch() as batch:
                batch.delete(name)
                batch.set(key_name(0, key + 1), make(0, key + 1, 5))
                batch.get(name)
        elif choice == 90:
            cache.clear()
        elif choice == 91:
            cache.purge()
        else:
            for each, found in cache.get_many(key_name(0, each) for each in range(key, key + 8)).items():
                assert is_sound(0, int(each.rpartition(" ")[2]), found), f"{each}: {found!r:.200}"
        took = time.perf_counter_ns() - began
        if took > ledger.word(worker, ledger.STALL):
            ledger.put(worker, ledger.STALL, took)
        found = cache.get(name, GONE)
        assert found is GONE or is_sound(0, key, found), f"{name}: {found!r:.200}"


def test_kills_while_entries_are_evicted_expired_and_cleared(
    make_cache: Callable[..., Cache], show: Callable[[str], None], seed: str
) -> None:
    print("SHMCACHE_SEED", seed)
    kills = 200 if COMPILED else 40
    cache = make_cache(max_bytes=8 * LARGEST if COMPILED else 24 * LARGEST, max_entries=150, shards=1)
    ledger = Ledger()
    rng = random.Random(seed)
    survivors: list[float] = []
    operations: list[float] = []
    began = time.perf_counter()
    with Family() as family:
        workers = [family.fork(crowd, cache, ledger, worker, f"{seed}-{worker}") for worker in range(WORKERS)]
        for number in range(kills):
            time.sleep(rng.random() * LONGEST_WAIT)
            victim = rng.randrange(WORKERS)
            workers[victim].signal(signal.SIGKILL)
            struck = time.perf_counter()
            cache.set("survivor", number)
            survivors.append(time.perf_counter() - struck)
            assert workers[victim].wait() == -signal.SIGKILL, "the worker had ended by itself"
            assert cache.check() == []
            assert len(cache) <= 150
            for worker in range(WORKERS):
                if worker != victim:
                    operations.append(ledger.word(worker, ledger.STALL) / 1e9)
                ledger.put(worker, ledger.STALL, 0)
            workers[victim] = family.fork(crowd, cache, ledger, victim, f"{seed}-{victim}-{number}")
        for worker in range(WORKERS):
            ledger.put(worker, ledger.STOP, 1)
        assert [worker.wait() for worker in workers] == [0] * WORKERS
    for name, value in cache.items():
        assert name == "survivor" or is_sound(0, int(name.rpartition(" ")[2]), value)
    stats = cache.stats()
    assert stats.evictions > 0
    assert stats.expirations > 0
    assert stats.recoveries > 0, "no kill ever hit a process that held a lock"
    show(
        f"{kills} kills in {time.perf_counter() - began:.1f} s, {stats.recoveries} of lock holders, "
        f"{stats.evictions:,} evictions"
        f"\n    a survivor's next operation, per kill: {milliseconds(survivors)}"
        f"\n    the other workers' longest operation, per kill: {milliseconds(operations)}"
    )
    assert max(survivors) < LONGEST_STALL


# --- a holder at rest -----------------------------------------------------------------------------------------------
def lock_word(cache: Cache) -> int:
    return int(cache.attachment.geometry.region(0).header) + layout.S_LOCK


def waiters(cache: Cache) -> int:
    return int(cache.attachment.words[lock_word(cache) - layout.S_LOCK + layout.S_WAITERS])


def hold(cache: Cache, then: Callable[[Cache], object] = lambda cache: None) -> None:
    """Take the lock of the only shard, as `acquire` does when nobody else wants it; then stop in its midst."""
    cache.get("anything")  # a forked child becomes a member at its first operation
    cache.attachment.words[lock_word(cache)] = cache.attachment.member.owner
    then(cache)
    os.kill(os.getpid(), signal.SIGSTOP)
    cache.attachment.words[lock_word(cache)] = 0
    cache.set("from the holder", "after all")


@pytest.fixture
def small(make_cache: Callable[..., Cache]) -> Cache:
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1, lock_timeout=0.3)
    cache.set("kept", "value")
    return cache


def test_a_stopped_holder_is_waited_for_and_never_robbed(small: Cache) -> None:
    with Family() as family:
        holder = family.fork(hold, small)
        holder.wait_until_stopped()
        owner = small.attachment.words[lock_word(small)]
        for attempt in (
            lambda: small.set("key", 1),
            lambda: small.delete("kept"),
            lambda: small.incr("n", initial=0),
            lambda: small.set_many({"a": 1}),
            small.clear,
            small.purge,
            small.check,
        ):
            began = time.monotonic()
            with pytest.raises(LockTimeout, match="live process"):
                attempt()
            assert 0.3 <= time.monotonic() - began < 0.3 + LONGEST_STALL
        began = time.monotonic()
        for _ in range(100):
            assert small.get("kept") == "value"
            assert small.get("missing", "nothing") == "nothing"
            assert list(small.items()) == [("kept", "value")]
            assert small.ttl("kept") is None
        assert time.monotonic() - began < LONGEST_STALL, "readers waited for the lock"
        assert small.attachment.words[lock_word(small)] == owner
        assert waiters(small) == 0, "those who gave up still count as waiting"

        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
        small.set("key", 2)
        assert dict(small.items()) == {"kept": "value", "from the holder": "after all", "key": 2}
        assert small.stats().recoveries == 0


def test_a_killed_holder_is_succeeded_at_once(small: Cache, show: Callable[[str], None]) -> None:
    took = []
    with Family() as family:
        for number in range(20):
            holder = family.fork(hold, small)
            holder.wait_until_stopped()
            holder.signal(signal.SIGKILL)
            began = time.perf_counter()
            small.set("key", number)
            took.append(time.perf_counter() - began)
            assert holder.wait() == -signal.SIGKILL
            assert small.check() == []
            assert small.get("key") == number
            assert small.stats().recoveries == number + 1
    show(f"taking over from a killed holder: {milliseconds(took)}")
    assert max(took) < LONGEST_STALL / 4


def test_all_waiters_go_on_when_the_holder_is_killed(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1)
    with Family() as family:
        holder = family.fork(hold, cache)
        holder.wait_until_stopped()
        writers = [family.fork(cache.set, f"writer {number}", number) for number in range(8)]
        until(lambda: waiters(cache) == 8)
        holder.kill()
        began = time.monotonic()
        assert [writer.wait() for writer in writers] == [0] * 8
        assert time.monotonic() - began < LONGEST_STALL
    assert dict(cache.items()) == {f"writer {number}": number for number in range(8)}
    assert cache.stats().recoveries == 1


def test_what_a_killed_holder_left_half_done_is_undone(small: Cache) -> None:
    """A transaction by hand: the log has the old value, the slot the new one, and its version is odd."""
    version = small.gets("kept")[1]

    def begin(cache: Cache) -> None:
        words = cache.attachment.words
        region = cache.attachment.geometry.region(0)
        [slot] = [
            number
            for number in range(cache.max_entries)
            if words[region.slots + number * layout.SLOT_WORDS + layout.E_PLACE] & 0xFFFF_FFFF
        ]
        at = region.slots + slot * layout.SLOT_WORDS
        words[region.header + layout.S_STAMP] += 2
        words[region.header + layout.S_SUBJECT] = slot + 1
        words[at + layout.E_VERSION] = words[region.header + layout.S_STAMP] - 1
        for field, value in ((layout.E_EXPIRY, 1), (layout.E_SIZES, 0), (layout.E_HASH, 0)):
            used = words[region.log + layout.L_USED]
            words[region.log + layout.L_ENTRIES + 2 * used] = at + field
            words[region.log + layout.L_ENTRIES + 2 * used + 1] = words[at + field]
            words[region.log + layout.L_USED] = used + 1
            words[at + field] = value

    with Family() as family:
        holder = family.fork(hold, small, begin)
        holder.wait_until_stopped()
        assert small.get("kept", "unknown") == "unknown", "a reader saw half a change"
        holder.kill()
        assert small.get("kept") == "value"
    assert small.check() == []
    after = small.gets("kept")[1]
    assert after is not None
    assert version is not None
    assert after > version, "a reader that overlapped the dead writer would accept what it saw"


def test_a_worker_killed_while_it_attaches_leaves_its_place(name: str) -> None:
    """With 64 places, none may be lost to processes that died at any moment between fork and first operation."""
    rng = random.Random(5)

    def attach(gate: Gate) -> None:
        gate.wait()
        with Cache(name, max_bytes=256 * 1024) as cache:
            while True:
                cache.set("again", 0)

    with Cache(name, max_bytes=256 * 1024) as cache, Family() as family:
        cache.set("kept", "value")
        for _ in range(100):
            gate = Gate()
            children = [family.fork(attach, gate) for _ in range(2)]
            gate.open()
            time.sleep(rng.random() * 0.004)
            for child in children:
                child.signal(signal.SIGKILL)
            for child in children:
                assert child.wait() == -signal.SIGKILL
            cache.set("again", 1)
            assert cache.stats().processes == 1
        assert cache.get("kept") == "value"
        assert cache.check() == []
