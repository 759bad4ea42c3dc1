"""The lock by itself, step by step: what a waiter does, in which order, and what it never does.

On the sources, where each step can be watched; who sleeps and what time it is are given by the test. That the lock
holds among real processes that are killed, stopped and interrupted is in test_kills.py and tests/torture/.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from shmcache import Cache, CacheClosed, LockTimeout, is_compiled
from shmcache.engine import layout, lock
from shmcache.engine.lock import Lock
from shmcache.engine.primitives import load, store
from tests.processes import Child, Gate, until

pytestmark = pytest.mark.skipif(is_compiled(), reason="steps through the sources")

MS = 1_000_000
FOREVER = 10**15


class Sleeper:
    """Stands for the semaphore: `then` is what happens while somebody sleeps, True what woke it. A sleep lasts 1 ms."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.then: Callable[[], bool] = lambda: False
        self.sleeps = 0
        self.wakes: list[int] = []

    def sleep(self) -> bool:
        self.sleeps += 1
        self.bench.now += MS
        assert self.sleeps < 1000, "it sleeps for ever"
        return self.then()

    def wake(self) -> None:
        self.wakes.append(self.bench.waiters)


class Bench:
    """A lock on a real segment, with a clock and a sleeper of the test's."""

    def __init__(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        self._attachment = cache._attachment
        self.words = self._attachment.words
        self.member = self._attachment.member
        self.header = self._attachment.geometry.region(0).header
        self.now = 10**15
        self.sleeper = Sleeper(self)
        self.lock = Lock(self.words, self.header, self.member, self.sleeper, self._attachment.guard)
        self.asked: list[tuple[int, int]] = []  # the owner that was asked after, and when
        self.began = self.now
        monkeypatch.setattr(lock, "precise_ns", lambda: self.now)
        self.answer(monkeypatch, lambda owner: True)

    def answer(self, monkeypatch: pytest.MonkeyPatch, alive: Callable[[int], bool]) -> None:
        """Have `alive` say who lives, and write down what it was asked."""

        def is_alive(owner: int) -> bool:
            self.asked.append((owner, self.now - self.began))
            return alive(owner)

        monkeypatch.setattr(self.member.registry, "is_alive", is_alive)

    @property
    def holder(self) -> int:
        return load(self.words, self.header + layout.S_LOCK)

    @holder.setter
    def holder(self, owner: int) -> None:
        store(self.words, self.header + layout.S_LOCK, owner)

    @property
    def waiters(self) -> int:
        return load(self.words, self.header + layout.S_WAITERS)

    @waiters.setter
    def waiters(self, number: int) -> None:
        store(self.words, self.header + layout.S_WAITERS, number)

    def counted(self, counter: int) -> int:
        return load(self.words, self.member.counters + counter)


@pytest.fixture
def bench(make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(make_cache(max_bytes="64KB", max_entries=4, shards=1), monkeypatch)


OTHER = 5 << 48 | 1  # the id of some other process


def test_it_is_taken_once_and_given_back(bench: Bench) -> None:
    assert bench.lock.try_acquire()
    assert bench.holder == bench.member.owner
    assert not bench.lock.try_acquire()
    assert bench.lock.release() == 0
    assert bench.holder == 0
    assert bench.lock.waited_for == 0
    assert bench.lock.acquire(0)
    assert bench.holder == bench.member.owner
    bench.lock.release()
    assert bench.counted(layout.C_LOCK_WAITS) == bench.counted(layout.C_LOCK_WAIT_NS) == 0
    assert bench.sleeper.wakes == []


def test_without_a_line_it_cannot_be_taken(bench: Bench) -> None:
    """Nobody could tell that its holder lives. Whoever waits gives up, rather than wait for what cannot be."""
    bench.member.owner = 0
    assert not bench.lock.try_acquire()
    assert bench.holder == 0
    message = "^the cache was closed by another thread while this one waited for a lock$"
    with pytest.raises(CacheClosed, match=message):
        bench.lock.acquire(FOREVER)
    assert bench.sleeper.sleeps == 0


def test_release_counts_one_waiter_out_before_it_posts(bench: Bench) -> None:
    bench.waiters = 3
    bench.lock.acquire(0)
    bench.lock.release()
    assert bench.sleeper.wakes == [2]
    assert bench.waiters == 2


def test_a_spinner_takes_what_becomes_free_without_sleeping(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spins = 0

    def pause() -> None:
        nonlocal spins
        spins += 1
        bench.now += 1
        if spins == 3:
            bench.holder = 0

    monkeypatch.setattr(lock, "pause", pause)
    bench.holder = OTHER
    assert bench.lock.acquire(FOREVER)
    assert (spins, bench.sleeper.sleeps) == (3, 0)
    assert bench.holder == bench.member.owner
    assert bench.counted(layout.C_LOCK_WAITS) == 1
    assert bench.counted(layout.C_LOCK_WAIT_NS) == 3


def test_a_lock_that_is_lost_to_another_spinner_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free when looked at, taken when swapped: it goes on."""
    tries = 0
    real = Lock.try_acquire

    def try_acquire(self: Lock) -> bool:
        nonlocal tries
        tries += 1
        if tries == 2:
            bench.holder = OTHER
        return real(self)

    def let_go() -> bool:
        bench.holder = 0
        return False

    monkeypatch.setattr(Lock, "try_acquire", try_acquire)
    monkeypatch.setattr(lock, "pause", lambda: None if tries > 1 else setattr(bench, "holder", 0))
    bench.holder = OTHER
    bench.sleeper.then = let_go
    assert bench.lock.acquire(FOREVER)
    assert tries == 3
    assert bench.sleeper.sleeps == 1


def test_one_that_oversleeps_counts_itself_out(bench: Bench) -> None:
    seen = []

    def then() -> bool:
        seen.append(bench.waiters)
        if len(seen) == 3:
            bench.holder = 0
        return False

    bench.sleeper.then = then
    bench.waiters = 7
    bench.holder = OTHER
    bench.lock.wait(FOREVER)
    assert seen == [8, 8, 8]
    assert bench.waiters == 7
    assert bench.counted(layout.C_LOCK_WAITS) == 1
    assert bench.counted(layout.C_LOCK_WAIT_NS) == 3 * MS


def test_one_that_is_woken_was_counted_out(bench: Bench) -> None:
    def then() -> bool:
        bench.lock.release()
        return True

    bench.sleeper.then = then
    bench.waiters = 7
    bench.holder = OTHER
    assert bench.lock.acquire(FOREVER)
    assert bench.waiters == 7
    assert bench.sleeper.wakes == [7]


def test_an_exception_while_it_sleeps_counts_it_out(bench: Bench) -> None:
    def then() -> bool:
        raise KeyboardInterrupt

    bench.sleeper.then = then
    bench.holder = OTHER
    with pytest.raises(KeyboardInterrupt):
        bench.lock.acquire(FOREVER)
    assert bench.waiters == 0
    assert bench.holder == OTHER


def test_it_looks_again_before_it_sleeps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given back before it was counted in, nobody would wake it."""
    real = Lock.add_waiters

    def add_waiters(self: Lock, by: int) -> bool:
        bench.holder = 0
        return real(self, by)

    monkeypatch.setattr(Lock, "add_waiters", add_waiters)
    bench.holder = OTHER
    assert bench.lock.acquire(FOREVER)
    assert bench.sleeper.sleeps == 0
    assert bench.waiters == 0


def test_waiters_are_never_less_than_none(bench: Bench) -> None:
    assert not bench.lock.add_waiters(-1)
    assert bench.waiters == 0
    assert bench.lock.add_waiters(1)
    assert bench.lock.add_waiters(1)
    assert bench.waiters == 2
    assert bench.lock.add_waiters(-1)
    assert bench.waiters == 1
    assert bench.lock.wake() == 0
    assert bench.sleeper.wakes == [0]
    bench.lock.wake()
    assert bench.sleeper.wakes == [0]


def test_more_waiters_than_can_be_are_none(bench: Bench) -> None:
    bench.waiters = layout.MAX_WAITERS - 1
    assert bench.lock.add_waiters(1)
    assert bench.waiters == layout.MAX_WAITERS
    for by in (1, -1):
        for nonsense in (layout.MAX_WAITERS, 1 << 63):
            bench.waiters = nonsense
            assert bench.lock.add_waiters(by)
            assert bench.waiters == 0


def test_counting_waiters_tries_again_and_gives_up_in_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being wrong costs a wake-up; trying for ever would be worse."""
    tries = 0
    succeed_at = 50
    real = lock.compare_and_swap

    def compare_and_swap(*args: object) -> bool:
        nonlocal tries
        tries += 1
        assert tries < 10_000
        return tries == succeed_at and real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lock, "compare_and_swap", compare_and_swap)
    assert bench.lock.add_waiters(1)
    assert (tries, bench.waiters) == (50, 1)
    succeed_at = 0
    assert not bench.lock.add_waiters(1)
    assert bench.waiters == 1


def test_a_child_that_is_forked_while_this_sleeps_does_not_wait_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is its parent's."""

    def then() -> bool:
        monkeypatch.setattr(lock, "process_epoch", lambda: 1)
        return False

    bench.sleeper.then = then
    bench.holder = OTHER
    with pytest.raises(LockTimeout, match="forked in the midst"):
        bench.lock.acquire(FOREVER)
    assert bench.sleeper.sleeps == 1


# --- live and dead owners -------------------------------------------------------------------------------------------
def test_a_live_owner_is_never_robbed(bench: Bench) -> None:
    """It is asked after when it was silent for longer than PROBE_NS since it was first seen, or last asked after."""
    bench.holder = OTHER
    assert not bench.lock.acquire(10 * MS)
    assert bench.holder == OTHER
    silence = layout.PROBE_NS // MS + 1  # ms, of 1 ms each
    assert bench.asked == [(OTHER, at * MS) for at in range(silence, 12, silence)]
    assert bench.sleeper.sleeps == 11  # the first moment later than 10 ms
    assert bench.waiters == 0
    assert bench.counted(layout.C_RECOVERIES) == 0
    assert bench.counted(layout.C_LOCK_WAITS) == 1
    assert bench.counted(layout.C_LOCK_WAIT_NS) == 11 * MS


def test_one_that_gave_up_knows_whom_it_waited_for(bench: Bench) -> None:
    bench.holder = bench.member.owner
    assert not bench.lock.acquire(3 * MS)
    assert bench.lock.waited_for == bench.member.owner
    assert f"is {os.getpid()}: is it stopped" in bench.lock.why_refused()


def test_one_that_gave_up_names_nobody_whom_it_did_not_see(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others took the lock and gave it back each time before this one looked."""
    monkeypatch.setattr(bench.lock, "try_acquire", lambda: False)
    monkeypatch.setattr(lock, "pause", lambda: setattr(bench, "now", bench.now + 10_000))
    assert not bench.lock.acquire(3 * MS)
    assert "others were always faster" in bench.lock.why_refused()


def test_a_process_is_not_asked_after_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another of its threads has the lock; its own byte never shows as locked."""
    bench.answer(monkeypatch, lambda owner: False)
    bench.holder = bench.member.owner
    assert not bench.lock.acquire(20 * MS)
    assert bench.asked == []
    assert bench.counted(layout.C_RECOVERIES) == 0


def test_a_dead_owner_is_succeeded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.answer(monkeypatch, lambda owner: False)
    bench.holder = OTHER
    assert bench.lock.acquire(FOREVER)
    assert bench.holder == bench.member.owner
    [(owner, at)] = bench.asked
    assert owner == OTHER
    assert layout.PROBE_NS < at <= layout.PROBE_NS + MS
    assert bench.counted(layout.C_RECOVERIES) == 1
    assert bench.counted(layout.C_LOCK_WAITS) == 1
    assert bench.waiters == 0


def test_one_dead_owner_has_one_successor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds that another was faster waits for that one, who is not dead."""
    successor = 6 << 48 | 1

    def alive(owner: int) -> bool:
        if owner == OTHER:
            bench.holder = successor
            return False
        return True

    bench.answer(monkeypatch, alive)
    bench.holder = OTHER
    assert not bench.lock.acquire(10 * MS)
    assert bench.holder == successor
    assert [owner for owner, _ in bench.asked][:2] == [OTHER, successor]
    assert bench.counted(layout.C_RECOVERIES) == 0
    assert bench.lock.waited_for == successor


def test_owners_that_change_are_not_asked_after(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is watched for PROBE_NS of its own."""
    bench.answer(monkeypatch, lambda owner: False)

    def then() -> bool:
        bench.holder += 1
        return False

    bench.sleeper.then = then
    bench.holder = OTHER
    assert not bench.lock.acquire(20 * MS)
    assert bench.asked == []


def test_a_lock_that_is_free_is_nobody_to_ask_after(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free whenever it is looked at and yet never to be had, because others are always faster."""
    monkeypatch.setattr(Lock, "try_acquire", lambda self: False)
    bench.answer(monkeypatch, lambda owner: False)
    monkeypatch.setattr(lock, "pause", lambda: setattr(bench, "now", bench.now + 10_000))
    assert not bench.lock.wait(20 * MS)
    assert bench.asked == []
    assert bench.holder == 0


def test_a_member_that_resigns_while_waiting_raises(bench: Bench) -> None:
    def then() -> bool:
        bench.member.owner = 0
        bench.holder = 0
        return False

    bench.sleeper.then = then
    bench.holder = OTHER
    with pytest.raises(CacheClosed):
        bench.lock.acquire(FOREVER)
    assert bench.holder == 0
    assert bench.waiters == 0


# --- what the kernel says of them -----------------------------------------------------------------------------------
def join(cache: Cache) -> int:
    """In a child: take a line of the process table; its owner id."""
    cache._attached()
    owner: int = cache._attachment.member.owner
    return owner


def test_who_lives_is_known_by_byte_and_generation(make_cache: Callable[..., Cache]) -> None:
    """And whose lock one gave up waiting for is told by a pid."""
    cache = make_cache(max_bytes="64KB", max_entries=4, shards=1)
    words, registry = cache._attachment.words, cache._attachment.member.registry
    header = cache._attachment.geometry.region(0).header
    gate = Gate()

    def work() -> None:
        store(words, header + layout.S_PEAK_BYTES, join(cache))  # a word that nobody needs
        gate.wait()

    child = Child(work)
    until(lambda: load(words, header + layout.S_PEAK_BYTES))
    owner = load(words, header + layout.S_PEAK_BYTES)
    assert registry.is_alive(owner)
    assert not registry.is_alive(owner + 1)
    assert not registry.is_alive(owner - 1)
    assert not registry.is_alive(owner + (1 << 48))  # the next line, of nobody
    assert registry.is_alive(cache._attachment.member.owner)
    assert not registry.is_alive(cache._attachment.member.owner + 1)
    assert not registry.is_alive(registry.processes << 48 | 1)  # a line that is not there
    assert set(registry.live_lines()) == {registry.own_line, owner >> 48}
    waiting = cache._attachment.shards[0].lock
    waiting.waited_for = owner
    assert f"is {child.pid}: is it stopped" in waiting.why_refused()
    gate.open()
    assert child.wait() == 0
    assert not registry.is_alive(owner)
    assert set(registry.live_lines()) == {registry.own_line}


def test_who_lives_cannot_be_asked_of_another_file(make_cache: Callable[..., Cache]) -> None:
    """The descriptor was closed, and perhaps opened again as another file: no answer is better than a wrong one."""
    cache = make_cache(max_bytes="64KB", max_entries=4, shards=1)
    registry = cache._attachment.member.registry
    fd = registry.fd
    for other in (-1, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)):
        registry.fd = other
        with pytest.raises(CacheClosed, match="another thread"):
            registry.is_alive(1)
        registry.fd = fd
    os.close(other)


# --- closing while others are at it ---------------------------------------------------------------------------------
def test_closing_waits_for_who_has_the_lock_and_not_for_who_waits_for_it(
    make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits has the mutex, and will not get the lock any more: closing lasted as long as its patience."""
    cache = make_cache(max_bytes="64KB", max_entries=4, shards=1, lock_timeout=600)
    shard = cache._attachment.shards[0]
    guard = cache._attachment.guard
    entered, go_on = threading.Event(), threading.Event()
    perform = shard.perform_locked

    def perform_slowly(*args: object) -> object:
        entered.set()
        go_on.wait()
        return perform(*args)

    monkeypatch.setattr(shard, "perform_locked", perform_slowly)
    monkeypatch.setattr(shard.mutex(), "lock", mutex := CountingLock())
    with ThreadPoolExecutor(3) as pool:
        holder = pool.submit(cache.set, "a", 1)
        entered.wait()
        waiter = pool.submit(cache.set, "b", 2)
        until(lambda: mutex.waiting)
        closing = pool.submit(cache.close)
        until(lambda: guard.fd < 0)
        go_on.set()
        closing.result(timeout=60)
        holder.result(timeout=60)
        with pytest.raises(CacheClosed):
            waiter.result(timeout=60)


class CountingLock:
    """A lock that says whether somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.waiting = 0

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waiting += 1
            self._lock.acquire()
            self.waiting -= 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_waiter_that_has_become_nobody_while_it_asked_takes_no_lock(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closed the cache while the kernel was asked about the holder, which is dead."""

    def is_alive(owner: int) -> bool:
        bench.member.owner = 0
        return False

    monkeypatch.setattr(bench.member, "registry", SimpleNamespace(is_alive=is_alive))
    bench.holder = OTHER
    with pytest.raises(CacheClosed):
        bench.lock.acquire(FOREVER)
    assert bench.holder == OTHER
