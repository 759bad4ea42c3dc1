"""Who a process is where pids do not tell: namespaces, pids and places used again, and processes that are stopped."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from shmcache import Cache, LockTimeout, segment
from shmcache.engine import layout
from shmcache.engine.bytelock import under_setup_lock
from shmcache.engine.membership import GENERATION_MASK
from tests.holders import hold, lock_word, owner, stop_in_section, take, take_and_pause, waiters, write_large_values
from tests.processes import Child, Family, Gate, no_gc, read, until

HANGS = 10.0  # seconds that nothing takes which does not hang, whatever else the machine has to do
TIMEOUT = 0.25  # lock_timeout of the caches here
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
CLONE_NEWPID = 0x2000_0000


@pytest.fixture(autouse=True)
def cheap_forks() -> Iterator[None]:
    with no_gc():
        yield


@pytest.fixture
def small(make_cache: Callable[..., Cache]) -> Cache:
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1, lock_timeout=TIMEOUT)
    cache.set("kept", "value")
    return cache


def goes_on(cache: Cache, recoveries: int) -> None:
    """Others write at once, and whoever died had the lock so many times in all."""
    cache.set("after", recoveries)  # or LockTimeout
    assert cache.get("after") == recoveries
    assert cache.get("kept") == "value"
    assert cache.check() == []
    assert cache.stats().recoveries == recoveries


# --- pid namespaces -------------------------------------------------------------------------------------------------
def unshare_pids() -> None:
    """Let the next child of this thread be pid 1 of a namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare is of Python 3.12
    if libc.unshare(CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def fork_as_pid_1(family: Family, work: Callable[..., object], *args: object) -> Child:
    def run() -> None:
        assert os.getpid() == 1
        work(*args)

    def start() -> Child:
        unshare_pids()
        return family.fork(run)

    with ThreadPoolExecutor(1) as thread:  # only its own children are in the new namespace
        return thread.submit(start).result()


def namespaces_missing() -> str | None:
    """Why no pid namespace can be made here, or None."""
    if sys.platform != "linux":
        return "pid namespaces are Linux's"
    with Family() as family:
        try:
            fork_as_pid_1(family, lambda: None).wait()
        except OSError as error:
            return f"no pid namespaces here (they need CAP_SYS_ADMIN): {os.strerror(error.errno or 0)}"
    return None


@pytest.fixture(scope="module")
def namespaces() -> None:
    if (lack := namespaces_missing()) is not None:
        pytest.skip(lack)


@pytest.mark.usefixtures("namespaces")
def test_workers_that_are_all_pid_1_lose_no_increment_when_some_are_killed(small: Cache) -> None:
    """As containers that share /dev/shm: what was acknowledged is there, and at most one more for each kill."""
    acknowledged = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    stop = len(acknowledged) - 1

    def work(number: int) -> None:
        with Cache(small.name) as cache:  # unrelated to the parent's attachment
            while not acknowledged[stop]:
                cache.incr("total", initial=0)
                acknowledged[number] += 1
                cache.set(f"own {number}", acknowledged[number])
                assert cache.get(f"own {number}") == acknowledged[number]

    def all_work(workers: int) -> bool:
        return all(acknowledged[number] > 20 for number in range(workers))

    kills = 12
    with Family() as family:
        workers = [fork_as_pid_1(family, work, number) for number in range(4)]
        for number in range(4, 4 + kills):
            until(partial(all_work, number))
            attached = small.stats().attached
            assert sorted(process.pid for process in attached) == sorted([1, 1, 1, 1, os.getpid()])
            assert workers.pop(0).kill() == -signal.SIGKILL
            workers.append(fork_as_pid_1(family, work, number))
        until(partial(all_work, 4 + kills))
        acknowledged[stop] = 1
        assert [worker.wait() for worker in workers] == [0] * 4
    done = sum(acknowledged[: 4 + kills])
    assert done <= small.get("total") <= done + kills
    for number in range(kills, 4 + kills):
        assert small.get(f"own {number}") == acknowledged[number]


@pytest.mark.usefixtures("namespaces")
def test_a_holder_in_another_namespace_is_waited_for_while_it_lives_and_succeeded_when_it_dies(small: Cache) -> None:
    """It is pid 1 there; whoever waits is pid 1 of yet another namespace, where its pid would be his own."""

    def wait_in_vain() -> None:
        with pytest.raises(LockTimeout, match=r"whose pid, as it sees itself, is 1:"):
            small.set("robbed", True)

    def wait_and_succeed() -> None:
        small.set("from the other", 1)

    with Family() as family:
        holder = fork_as_pid_1(family, take_and_pause, small)
        until(lambda: owner(small))
        before = owner(small)
        assert fork_as_pid_1(family, wait_in_vain).wait() == 0
        wait_in_vain()
        assert owner(small) == before
        assert small.get("kept") == "value"
        other = fork_as_pid_1(family, wait_and_succeed)
        until(lambda: waiters(small) == 1)
        holder.kill()
        assert other.wait() == 0
    assert small.get("from the other") == 1
    assert "robbed" not in small
    goes_on(small, recoveries=1)


@pytest.mark.usefixtures("namespaces")
def test_a_child_that_has_its_parents_pid(small: Cache) -> None:
    """A pid 1 forks a pid 1: the child is told from its parent all the same, and takes no part of its identity."""

    def child() -> None:
        assert os.getpid() == 1
        with pytest.raises(LockTimeout):
            small.set("robbed", True)
        assert small.stats().processes == 3

    def parent() -> None:
        take(small)
        unshare_pids()
        assert Child(child).wait() == 0
        small._attachment.words[lock_word(small)] = 0
        small.set("from the parent", 1)

    with Family() as family:
        assert fork_as_pid_1(family, parent).wait() == 0
    assert small.get("from the parent") == 1
    assert "robbed" not in small
    goes_on(small, recoveries=0)


# --- pids that are used again ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("who", ["the new one", "another"])
def test_a_process_with_the_pid_of_a_dead_holder(small: Cache, who: str) -> None:
    """It is not taken for the dead one: the lock is recovered, by itself or by another, and it has an id of its own."""

    def second(dead: int) -> None:
        small.get("kept")  # takes a line of the process table
        assert owner(small) == dead != small._attachment.member.owner
        if who == "the new one":
            goes_on(small, recoveries=1)
        else:
            signal.pause()

    def pid_1() -> None:
        first = Child(take_and_pause, small)
        until(lambda: owner(small))
        dead = owner(small)
        first.kill()
        LAST_PID.write_text(str(first.pid - 1))
        again = Child(second, dead)
        assert again.pid == first.pid
        if who == "the new one":
            assert again.wait() == 0
        else:
            until(lambda: again.pid in [process.pid for process in small.stats().attached])
            goes_on(small, recoveries=1)
            again.kill()

    if not os.access(LAST_PID, os.W_OK):
        pytest.skip(f"pids cannot be chosen here: {LAST_PID} cannot be written")
    with Family() as family:
        assert fork_as_pid_1(family, pid_1).wait() == 0
    goes_on(small, recoveries=1)


def test_a_holder_that_becomes_another_program(small: Cache) -> None:
    """After exec the pid lives on, but not the process that had the lock. The new program attaches as any other."""
    program = textwrap.dedent(
        """
        import os, sys
        from shmcache import Cache
        with Cache(sys.argv[1]) as cache:
            cache.set("from the new program", os.getpid())
            assert cache.check() == []
        """
    )

    def become() -> None:
        take(small)
        os.execv(sys.executable, [sys.executable, "-W", "error", "-c", program, small.name])

    with Family() as family:
        child = family.fork(become)
        assert child.wait() == 0
    assert small.get("from the new program") == child.pid
    goes_on(small, recoveries=1)


# --- places of the process table ------------------------------------------------------------------------------------
def leave_one_place(cache: Cache) -> None:
    """Make all vacant places look as if a process had died there; so the next one to die is the next to be replaced."""
    registry = cache._attachment.registry
    for line in range(registry.processes):
        pid = registry.line(line) + layout.P_PID
        if line > 1 and cache._attachment.words[pid] == 0:
            cache._attachment.words[pid] = 1


def test_the_place_of_a_dead_holder_is_taken_before_anybody_waits(small: Cache) -> None:
    """The byte of the lock file is locked again, but the generation has moved: the dead one's lock is recovered."""
    gate = Gate()
    leave_one_place(small)

    def die() -> None:
        for _ in range(3):
            small.set("counted", 1)
        take(small)
        os.write(tell, b".")
        signal.pause()

    def replace(dead: int) -> None:
        small.get("kept")
        member = small._attachment.member
        assert member.owner >> 48 == dead >> 48 == 1, "it has another place"
        assert member.owner == dead + 1
        assert owner(small) == dead
        os.write(tell, b".")
        gate.wait()
        small.set("from the new one", 1)

    told, tell = os.pipe()
    with Family() as family:
        holder = family.fork(die)
        assert read(told) == b"."
        dead = owner(small)
        holder.kill()
        new = family.fork(replace, dead)
        assert read(told) == b"."
        before = small.stats()
        assert before.sets == 1 + 3, "what the dead one counted is lost"
        goes_on(small, recoveries=1)
        gate.open()
        assert new.wait() == 0
    os.close(told)
    os.close(tell)
    assert small.get("from the new one") == 1
    assert small.stats().sets == before.sets + 2


@pytest.mark.parametrize("place", [0, 1])
def test_generations_begin_again_after_2_to_the_48(make_cache: Callable[..., Cache], place: int) -> None:
    """An owner id is never 0, which says that a lock is free; and a dead holder of the last generation is known."""
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1, lock_timeout=TIMEOUT)
    name, lock_at = cache.name, lock_word(cache)
    generation_at = cache._attachment.registry.line(place) + layout.P_GENERATION
    cache.set("kept", "value")
    leave_one_place(cache)
    if place == 0:
        cache._attachment.words[cache._attachment.registry.line(1) + layout.P_PID] = 1
        cache.close()  # its place is for the children

    def attach_and(work: Callable[[Cache], object]) -> None:
        with Cache(name, lock_timeout=TIMEOUT) as own:
            assert own._attachment.member.owner >> 48 == place
            assert own._attachment.member.owner & GENERATION_MASK != 0
            work(own)

    with Family() as family, open(Path(segment.DIRECTORY) / segment.file_name(name), "r+b") as file:
        os.pwrite(file.fileno(), (GENERATION_MASK - 1).to_bytes(8, sys.byteorder), generation_at * 8)
        assert family.fork(attach_and, lambda own: own.set("last of its kind", 1)).wait() == 0
        holder = family.fork(attach_and, take_and_pause)
        until(lambda: any(os.pread(file.fileno(), 8, lock_at * 8)))
        holder.kill()
        assert family.fork(attach_and, lambda own: goes_on(own, 1)).wait() == 0
    goes_on(make_cache(name), 1)


# --- stopped --------------------------------------------------------------------------------------------------------
def test_a_holder_stopped_in_truth(make_cache: Callable[..., Cache]) -> None:
    """Stopped somewhere in a critical section: writers give up in time, readers go on, nothing is stolen."""
    cache = make_cache(max_bytes="8MB", max_entries=64, shards=1, lock_timeout=TIMEOUT)
    cache.set("kept", "value")
    with Family() as family:
        child = family.fork(write_large_values, cache)
        until(lambda: cache.get("writes"))
        for _ in range(2):
            stop_in_section(child, cache)
            stopped = owner(cache)
            attempts: list[Callable[[], object]] = [lambda: cache.set("key", 1), cache.check]
            for attempt in attempts:
                began = time.monotonic()
                with pytest.raises(LockTimeout, match=rf"live process has it.* is {child.pid}: is it stopped"):
                    attempt()
                assert TIMEOUT <= time.monotonic() - began < TIMEOUT + HANGS
            began = time.monotonic()
            for _ in range(200):
                assert cache.get("kept") == "value"
            assert time.monotonic() - began < HANGS / 2, "readers waited for the lock, 50 ms each"
            assert cache.get("missing", "nothing") == "nothing"
            assert set(cache.get_many(["kept", "missing", "large"])) in ({"kept"}, {"kept", "large"})
            assert cache.info("kept").ttl is None
            assert "kept" in list(cache.keys())
            assert {process.pid for process in cache.stats().attached} == {os.getpid(), child.pid}
            assert cache.stats().recoveries == 0
            assert owner(cache) == stopped
            assert waiters(cache) <= 1  # one if a post for nobody, of one that overslept as it was woken, was used here
            child.signal(signal.SIGCONT)
            cache.set("key", 2)
            assert cache.check() == []
        cache.set("stop", 1)
        assert child.wait() == 0
    assert cache.stats().recoveries == 0
    assert cache.get("kept") == "value"


def test_a_stopped_waiter_holds_up_nobody(small: Cache) -> None:
    """Wake-ups that go to it are lost, and missed by nobody for long."""
    with Family() as family:
        holder = family.fork(hold, small)
        holder.wait_until_stopped()
        waiter = family.fork(lambda: Cache(small.name, lock_timeout=30).set("from the waiter", 1))
        until(lambda: waiters(small) == 1)
        waiter.signal(signal.SIGSTOP)
        waiter.wait_until_stopped()
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
        others = [family.fork(lambda: [small.incr("n", initial=0) for _ in range(50)]) for _ in range(2)]
        assert [other.wait() for other in others] == [0, 0]
        assert small.get("n") == 100
        assert "from the waiter" not in small
        waiter.signal(signal.SIGCONT)
        assert waiter.wait() == 0
    assert small.get("from the waiter") == 1
    goes_on(small, recoveries=0)


def test_a_process_stopped_while_it_attaches(small: Cache) -> None:
    """Others cannot attach meanwhile, nor unlink, and are told why; who is attached already notices nothing."""

    def stop() -> None:
        under_setup_lock(small._attachment.lock_fd, 5, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        small.set("from the stopped one", 1)

    reason = "somebody has been creating, attaching to or unlinking this cache.*stopped process"
    with Family() as family:
        other = family.python()
        other.ask("0")  # it has started
        stopped = family.fork(stop)
        stopped.wait_until_stopped()
        began = time.monotonic()
        answer = other.ask(f"(c := Cache({small.name!r}, lock_timeout={TIMEOUT}))")
        assert time.monotonic() - began < TIMEOUT + HANGS
        assert answer.startswith("LockTimeout: somebody has been creating, attaching to or unlinking this cache")
        with pytest.raises(LockTimeout, match=reason):
            segment.unlink(small.name, TIMEOUT)
        began = time.monotonic()
        small.set("key", 1)
        assert small.get("kept") == "value"
        assert small.stats().processes == 1
        assert small.check() == []
        assert time.monotonic() - began < TIMEOUT
        stopped.signal(signal.SIGCONT)
        assert stopped.wait() == 0
        other.ask(f"(c := Cache({small.name!r}))")
        assert other.ask("c.get('from the stopped one')") == 1
        assert other.finish() == (0, "")
    goes_on(small, recoveries=0)
