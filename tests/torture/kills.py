"""Processes killed with SIGKILL at any instant: nobody hangs, nothing that was stored is lost.

The workers of a storm keep a ledger in memory that outlives them: what they are about to do, and what they have done.
So after a death it is known, key by key, which values may be there: the one that was acknowledged or the one that was
being written, and no other.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from shmcache import Cache, is_compiled, segment
from tests.processes import Child, Family, no_gc
from tests.torture.campaign import Part, Trial
from tests.torture.stalls import Stalls, going_first

COMPILED = is_compiled()

WORKERS = 8 if COMPILED else 3
KEYS = 24  # of each worker
COUNTERS = 4  # how many of these are numbers for `incr`
LARGEST = 64 * 1024 if COMPILED else 4096
SPARED = 0.05  # seconds of one operation after which a worker is not killed: were it to hang, nobody would know
HANGS = 10.0  # seconds after which an operation will not end any more, whatever else the machine has to do
CALM = 20  # looks at each storm's workers before the first death
CALM_WINDOW = 0.01  # seconds, about what there is between two deaths
AFTERMATH = 0.1  # seconds after a look at a large cache until all that waited for it have done so
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

    Every worker has: the number of intended changes, operations done, whether it is to stop, additions to the shared
    counter done; then the sequence number of each key (0: absent); then (key, sequence) for each intended change.
    """

    INTENDED, DONE, STOP, ADDED = range(4)
    STATE = 8
    INTENTS = STATE + KEYS
    SHARED = KEYS  # as the key of an intent: an addition to the counter that all workers share
    SIZE = INTENTS + 2 * 2 * (KEYS + 1)

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, WORKERS * self.SIZE * 8)).cast("Q")
        self.stalls = Stalls(WORKERS)

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
            # A burst times each of its operations.
            answer = operation() if operation == self.in_a_burst else self.timed(operation)
            ledger.acknowledge(number, steps[-1])
            assert answer == expected, f"{operation} of worker {number}: {answer!r:.200}, expected {expected!r:.200}"
            ledger.put(number, ledger.DONE, ledger.word(number, ledger.DONE) + 1)

            other, key = self.rng.randrange(WORKERS), self.rng.randrange(KEYS)
            found = self.timed(partial(self.cache.get, key_name(other, key), GONE))
            assert found is GONE or is_sound(other, key, found), f"{key_name(other, key)}: {found!r:.200}"

    def timed(self, operation: Callable[[], object]) -> object:
        return self.ledger.stalls.timed(self.number, operation)

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
            self.timed(lambda: self.cache.delete_many(self.burst_values))
            self.timed(lambda: self.cache.set_many(self.burst_values))


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


def crowd(cache: Cache, ledger: Ledger, worker: int, seed: str) -> None:
    """All workers change the same keys, with far too little room, and empty the cache now and then."""
    rng = random.Random(seed)
    burst = {key_name(0, key): make(0, key, 7) for key in range(COUNTERS, 60)}
    while not ledger.word(worker, ledger.STOP):
        key = rng.randrange(COUNTERS, 200)
        if rng.randrange(10):
            ledger.stalls.timed(worker, any_operation(cache, rng, key))
        else:
            for _ in range(4 if COMPILED else 1):
                ledger.stalls.timed(worker, lambda: cache.set_many(burst))
        found = ledger.stalls.timed(worker, partial(cache.get, key_name(0, key), GONE))
        assert found is GONE or is_sound(0, key, found), f"{key_name(0, key)}: {found!r:.200}"


def any_operation(cache: Cache, rng: random.Random, key: int) -> Callable[[], object]:
    name = key_name(0, key)
    value = make(0, key, rng.randrange(1, 1 << 31))
    ttl = rng.choice((None, 1000, 0.002))

    def in_a_batch() -> None:
        with cache.batch() as batch:
            batch.delete(name)
            batch.set(key_name(0, key + 1), make(0, key + 1, 5))
            batch.get(name)

    def get_several() -> None:
        for each, found in cache.get_many(key_name(0, each) for each in range(key, key + 8)).items():
            assert is_sound(0, int(each.rpartition(" ")[2]), found), f"{each}: {found!r:.200}"

    def count() -> None:
        assert cache.incr(key_name(0, key % COUNTERS), initial=0) > 0

    often = (
        lambda: cache.set(name, value, ttl),
        lambda: cache.delete(name),
        lambda: cache.add(name, value),
        lambda: cache.replace(name, value),
        lambda: cache.touch(name, ttl),
        count,
        in_a_batch,
        get_several,
    )
    seldom = (cache.clear, cache.purge)
    return rng.choices((*often, *seldom), weights=(40, *[8] * 7, 1, 1))[0]


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


# --- the storms -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Storm:
    """One cache, its workers, and a number of kills."""

    name: str
    kills: int
    options: dict[str, Any]
    background: int = 0  # entries that nobody changes
    check_each: int = 1  # kills until all of the cache is checked again


STORMS = (
    Storm("1,000 entries", 250, {"max_bytes": "64MB" if COMPILED else "4MB", "max_entries": 2048, "shards": 1}, 1000),
    Storm("4 shards", 250, {"max_bytes": "64MB" if COMPILED else "4MB", "max_entries": 2048, "shards": 4}),
    Storm("evicting", 250, {"max_bytes": (8 if COMPILED else 24) * LARGEST, "max_entries": 150, "shards": 1}),
)
LARGE_STORM = Storm(
    "1,000,000 entries", 250, {"max_bytes": "512MB", "max_entries": 1_100_000}, 1_000_000, check_each=50
)


def room_for_large() -> bool:
    room = os.statvfs(segment.DIRECTORY)
    return room.f_bavail * room.f_frsize > 600 * 2**20


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one kill. A short run, or a small /dev/shm, leaves out the storm with a million entries."""
    storms = [*STORMS, LARGE_STORM] if COMPILED and trial.goal is None and room_for_large() else STORMS
    with no_gc(), going_first():
        for number in itertools.count():
            storm = storms[number % len(storms)]
            with trial.cache(**storm.options) as cache:
                for start in range(0, storm.background, 10_000):
                    cache.set_many(
                        {f"background {each}": each for each in range(start, start + 10_000)[: storm.background]}
                    )
                run = evicting if storm.name == "evicting" else keeping
                yield from run(trial, storm, cache, f"{trial.seed}-{number}")


def keeping(trial: Trial, storm: Storm, cache: Cache, seed: str) -> Iterator[None]:
    """Nothing is evicted: after each death all that was acknowledged is there."""
    per_shard = one_key_of_each_shard(cache)
    ledger = Ledger()
    unsure = 0
    with Family() as family:
        workers = [family.fork(work, cache, ledger, worker, f"{seed}-{worker}") for worker in range(WORKERS)]
        calm(trial, storm, ledger)
        for number in range(storm.kills):
            victim = strike(trial, storm, cache, per_shard, ledger, workers)
            if number % storm.check_each == 0:
                check(trial, storm, cache, ledger)
            unsure += (ledger.SHARED, 1) in ledger.intents(victim)
            for key in range(KEYS):
                ledger.settle(victim, key, value_after_death(cache, ledger, victim, key))
            ledger.put(victim, ledger.INTENDED, 0)
            workers[victim] = family.fork(work, cache, ledger, victim, f"{seed}-{victim}-{number}")
            try:
                yield
            except GeneratorExit:
                break  # the time is over: what the storm came to is looked at all the same
        end(cache, ledger, workers)
    for worker in range(WORKERS):
        assert not ledger.intents(worker)
        for key in range(KEYS):
            value_after_death(cache, ledger, worker, key)
            trial.count("entries found as acknowledged")
        trial.count("operations", ledger.word(worker, ledger.DONE))
    added = sum(ledger.word(worker, ledger.ADDED) for worker in range(WORKERS))
    assert added <= cache.get("shared", 0) <= added + unsure
    for number in range(storm.background):
        assert cache.get(f"background {number}") == number
    stats = cache.stats()
    assert stats.evictions == stats.expirations == 0, "the cache was meant to be large enough"
    assert stats.processes == 1


def evicting(trial: Trial, storm: Storm, cache: Cache, seed: str) -> Iterator[None]:
    """Far too little room, short lives, and everything emptied now and then: what is there is whole."""
    per_shard = one_key_of_each_shard(cache)
    ledger = Ledger()
    with Family() as family:
        workers = [family.fork(crowd, cache, ledger, worker, f"{seed}-{worker}") for worker in range(WORKERS)]
        calm(trial, storm, ledger)
        for number in range(storm.kills):
            victim = strike(trial, storm, cache, per_shard, ledger, workers)
            check(trial, storm, cache, ledger)
            assert len(cache) <= storm.options["max_entries"]
            workers[victim] = family.fork(crowd, cache, ledger, victim, f"{seed}-{victim}-{number}")
            try:
                yield
            except GeneratorExit:
                break  # as above
        end(cache, ledger, workers)
    for name, value in cache.items():
        assert name.startswith("survivor") or is_sound(0, int(name.rpartition(" ")[2]), value)


def strike(trial: Trial, storm: Storm, cache: Cache, per_shard: list[str], ledger: Ledger, workers: list[Child]) -> int:
    """Kill a worker at a random moment, and see how long the others are held up; which it was."""
    before = cache.stats().recoveries
    time.sleep(trial.rng.random() * LONGEST_WAIT)
    victim = trial.rng.choice(
        [worker for worker in range(WORKERS) if ledger.stalls.so_far(worker) < SPARED * 1e9] or range(WORKERS)
    )
    struck = time.perf_counter()
    workers[victim].signal(signal.SIGKILL)
    assert workers[victim].wait() == -signal.SIGKILL, "the worker had ended by itself"
    dead = time.perf_counter()
    for name in per_shard:
        cache.set(name, victim)
    recovered = time.perf_counter()

    assert storm.name == "evicting" or [cache.get(name) for name in per_shard] == [victim] * len(per_shard)
    # What it may take depends on what else the machine does, and is judged by its distribution on the page.
    assert recovered - dead < HANGS, f"the end took {dead - struck:.2f} s, recovery {recovered - dead:.2f} s"
    trial.count("kills")
    if cache.stats().recoveries > before:
        trial.count("deaths of lock holders")
        trial.measure(f"end of a killed holder, {storm.name}", dead - struck)
        trial.measure(f"recovery, {storm.name}", recovered - dead)
    measure_stalls(trial, storm, ledger, "of the others", victim)
    ledger.stalls.forget(victim)
    for worker in set(range(WORKERS)) - {victim}:
        demand_life(ledger, workers[worker], worker)
    return victim


def demand_life(ledger: Ledger, child: Child, worker: int) -> None:
    """Fail if a worker has ended, or its operation does not end."""
    child.poll()
    so_far = ledger.stalls.so_far(worker) / 1e9
    assert so_far < HANGS, f"worker {worker}, process {child.pid}, hangs: {so_far:.1f} s in one operation"


def measure_stalls(trial: Trial, storm: Storm, ledger: Ledger, when: str, victim: int | None = None) -> None:
    """Note the longest operation since the last look of anybody but the victim."""
    longest = ledger.stalls.take(victim)
    trial.measure(f"longest operation {when}, {storm.name}", longest.operation)
    if longest.but_for_cores is not None:
        trial.measure(f"longest operation {when}, but for waiting for a core, {storm.name}", longest.but_for_cores)


def calm(trial: Trial, storm: Storm, ledger: Ledger) -> None:
    """For comparison: how long operations take while nobody dies."""
    for _ in range(CALM):
        time.sleep(CALM_WINDOW)
        measure_stalls(trial, storm, ledger, "with no death")


def check(trial: Trial, storm: Storm, cache: Cache, ledger: Ledger) -> None:
    """Nothing contradicts itself. How long this made the others wait is another figure than what a death did."""
    ledger.stalls.take()
    assert cache.check() == []
    if storm.check_each > 1:  # it takes long
        time.sleep(AFTERMATH)
        measure_stalls(trial, storm, ledger, "beside check()")


def end(cache: Cache, ledger: Ledger, workers: list[Child]) -> None:
    """Let all workers end, which each does after an operation, and compare everything for the last time."""
    for worker in range(WORKERS):
        ledger.put(worker, ledger.STOP, 1)
    assert [worker.wait(HANGS) for worker in workers] == [0] * WORKERS
    assert cache.check() == []


PART = Part(
    claim="a process killed at any moment costs nobody a stored entry, a lock, or more than a moment",
    rounds=rounds,
    short=1000 if COMPILED else 120,
    share=4.0,
)
