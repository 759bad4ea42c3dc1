"""Who may come, go and die: creating, attaching, exiting and unlinking by many real processes at once."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import sys
import textwrap
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmcache import Cache, CacheNotFound, CorruptSegment, TooManyProcesses, attachment, is_compiled, segment
from shmcache.engine import layout
from shmcache.engine.membership import Registry
from tests.processes import DEADLINE, WAYS_TO_LEAVE, Child, Family, Gate, files, no_gc, read, run_python, until
from tests.torture import faults

SMALL = 256 * 1024


# --- creating -------------------------------------------------------------------------------------------------------
def test_50_processes_that_begin_at_once_get_one_cache(name: str) -> None:
    gate, all_wrote = Gate(), Gate()
    told, tell = os.pipe()

    def work(number: int) -> None:
        gate.wait()
        with Cache(name, max_bytes="4MB") as cache:
            cache.set(number, f"from {number}")
            os.write(tell, b".")
            all_wrote.wait()
            assert cache.get_many(range(50)) == {each: f"from {each}" for each in range(50)}
            assert cache.incr("arrived", initial=0) > 0

    with no_gc(), Family() as family:
        children = [family.fork(work, number) for number in range(50)]
        gate.open()
        for _ in range(50):
            assert read(told) == b"."
        all_wrote.open()
        assert [child.wait() for child in children] == [0] * 50
    os.close(told)
    os.close(tell)
    with Cache.attach(name) as cache:
        assert cache.get("arrived") == 50
        assert len(cache) == 51
        assert cache.stats().processes == 1


def test_the_creator_is_killed_at_a_random_moment_while_others_begin(name: str) -> None:
    """Whoever is first may die half-way; the others get one cache all the same, and a whole one."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    rng = random.Random(seed)

    def work(gate: Gate, number: int) -> None:
        gate.wait()
        with Cache(name, max_bytes="16MB") as cache:
            cache.set(number, number)
            deadline = time.monotonic() + DEADLINE
            while len(cache.get_many(range(8))) < 8:
                assert time.monotonic() < deadline, f"{number} sees only {sorted(cache.get_many(range(8)))}"
            assert cache.incr("complete", initial=0) <= 8

    def create(gate: Gate) -> None:
        gate.wait()
        Cache(name, max_bytes="16MB")

    semaphores = unfinished_semaphores()
    began = time.perf_counter()
    Cache(name, max_bytes="16MB").unlink()
    creation = time.perf_counter() - began
    half_done = 0
    with no_gc(), Family() as family:
        for _ in range(20):
            first, others = Gate(), Gate()
            creator = family.fork(create, first)
            children = [family.fork(work, others, number) for number in range(8)]
            first.open()
            time.sleep(rng.random() * creation * 1.5)
            others.open()
            half_done += creator.kill() == -signal.SIGKILL
            assert [child.wait() for child in children] == [0] * 8
            with Cache.attach(name) as cache:
                assert cache.get("complete") == 8
                assert cache.check() == []
            assert segment.unlink(name)
            assert files(name) == []
    for file in unfinished_semaphores() - semaphores:
        file.unlink()
    assert half_done > 0, "every creator was through before it was killed"


def unfinished_semaphores() -> set[Path]:
    """What the C library leaves of a semaphore that it was just creating; nobody can know whose it was."""
    return set(Path(segment.DIRECTORY).glob("sem.??????"))


def steps_of_creation() -> list[tuple[str, int]]:
    """Calls during a creation, before which a creator can die: the function and which call of it."""
    header = [("store", number) for number in range(1, 17)]
    return [("_create", 1), ("_reserve", 1), *header, ("_start_reaper", 1)]


@pytest.mark.parametrize(("function", "call"), steps_of_creation(), ids=lambda value: str(value))
def test_the_creator_dies_before_this_step(name: str, function: str, call: int) -> None:
    def create() -> None:
        calls = 0
        module = attachment if function in ("_create", "_start_reaper") else segment
        real = getattr(module, function)

        def stand_in(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(module, function, stand_in)
        Cache(name, max_bytes=SMALL, ephemeral=True)

    assert Child(create).wait() == -signal.SIGKILL
    complete = function == "_start_reaper"
    if not complete:
        with pytest.raises((CacheNotFound, CorruptSegment)):
            Cache.attach(name)
    with Cache(name, max_bytes=SMALL, max_entries=100) as cache:
        cache.set("key", "value")
        assert cache.get("key") == "value"
        assert cache.check() == []
        with Family() as family:
            other = family.python()
            assert other.ask(f"Cache({name!r}).get('key')") == "value"
            assert other.finish() == (0, "")


def dies_taking_a_place(name: str, last: int) -> bool:
    """Attach in a child, creating the cache if need be, that dies before its store number `last` of taking a line of
    the process table; whether it came to that store.
    """

    def work() -> None:
        take = Registry._take_line

        def take_line(registry: Registry) -> None:
            faults.arm(last)
            take(registry)
            os._exit(0)

        setattr(Registry, "_take_line", take_line)  # noqa: B010
        Cache(name, max_bytes=SMALL)

    code = Child(work).wait()
    assert code in (0, -signal.SIGKILL)
    return code != 0


def counts(cache: Cache) -> list[float]:
    """All that processes count, in total."""
    stats = cache.stats()
    return [
        *(stats.hits, stats.misses, stats.sets, stats.deletes),
        *(stats.recoveries, stats.lock_waits, stats.lock_wait_seconds, stats.read_retries),
    ]


@pytest.mark.skipif(is_compiled(), reason="steps through the sources")
def test_the_creator_dies_at_each_store_of_taking_its_place(name: str) -> None:
    for last in itertools.count(1):
        died = dies_taking_a_place(name, last)
        with Cache.attach(name) as cache:
            assert counts(cache) == [0] * 8
            assert cache.stats().processes == 1
            cache.set("key", "value")
            assert cache.get("key") == "value"
            assert cache.check() == []
        segment.unlink(name)
        if not died:
            break
    assert last > 4, "generation, time and pid at least are stored, and some counters"


@pytest.mark.skipif(is_compiled(), reason="steps through the sources")
def test_a_process_dies_at_each_store_of_taking_the_place_of_a_dead_one(make_cache: Callable[..., Cache]) -> None:
    """It makes what the dead one has counted part of the totals, and each may only be there once."""
    cache = make_cache(max_bytes=SMALL)
    registry = cache._attachment.registry
    counters = registry.line(1) + layout.P_COUNTERS  # the first place that is free

    def count_and_die() -> None:
        with Cache(cache.name) as own:
            assert own._attachment.registry.own_line == 1
            own._attachment.words[counters : counters + 8] = array("Q", range(11, 19))
            os.kill(os.getpid(), signal.SIGKILL)

    for line in range(2, registry.processes):  # as if a process had died in each: an empty one would be taken first
        cache._attachment.words[registry.line(line) + layout.P_PID] = 1
    for last in itertools.count(1):
        cache._attachment.words[registry.line(1) + layout.P_PID] = 0
        assert Child(count_and_die).wait() == -signal.SIGKILL
        expected = counts(cache)
        died = dies_taking_a_place(cache.name, last)
        assert counts(cache) == expected, f"dead before store {last}"
        with Family() as family:  # one more takes that place, and the remains of what was counted
            assert family.fork(lambda: Cache(cache.name).close()).wait() == 0
        assert counts(cache) == expected, f"dead before store {last}, and another one has come"
        assert cache.stats().processes == 1
        cache.set("key", last)
        assert cache.get("key") == last
        assert cache.check() == []
        if not died:
            break
    assert last > 4


# --- every way to start a process -----------------------------------------------------------------------------------
MULTIPROCESSING = """
    import multiprocessing, os, sys
    from shmcache import Cache

    def start(cache):
        global shared
        shared = cache

    def work(number):
        shared.set(number, os.getpid())
        return os.getpid(), shared.get("from the parent")

    def single(cache, number):
        cache.set(number, os.getpid())
        assert cache.get("from the parent") == "seen"

    if __name__ == "__main__":
        method, name = sys.argv[1:]
        context = multiprocessing.get_context(method)
        cache = Cache(name, max_bytes="1MB")
        cache.set("from the parent", "seen")
        with context.Pool(3, start, (cache,)) as pool:
            answers = pool.map(work, range(30), chunksize=1)
            pool.close()
            pool.join()
        assert {seen for _, seen in answers} == {"seen"}
        assert os.getpid() not in {pid for pid, _ in answers}
        assert cache.get_many(range(30)) == {number: pid for number, (pid, _) in enumerate(answers)}
        children = [context.Process(target=single, args=(cache, number)) for number in range(30, 33)]
        for child in children:
            child.start()
        for child in children:
            child.join(30)
        assert [child.exitcode for child in children] == [0, 0, 0]
        assert cache.get_many(range(30, 33)) == {number: children[number - 30].pid for number in range(30, 33)}
        print(len(cache), cache.check())
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(name: str, tmp_path: Path, method: str) -> None:
    """Pool and Process with a Cache as an argument. Nothing is unlinked by any exit, and nothing printed to stderr."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(MULTIPROCESSING))
    with Cache(name, max_bytes="1MB") as cache:
        run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        if method == "fork":
            output = run_python(run, str(program), method, name)
        else:
            output = run_program(program, method, name)
        assert output == "34 []\n"
        assert len(cache) == 34, "the cache here is another one"
        assert cache.stats().processes == 1


def run_program(program: Path, *args: str) -> str:
    """Run a program from its file, which spawn and forkserver need to import it."""
    import subprocess

    from tests.processes import environment

    answer = subprocess.run(
        [sys.executable, "-W", "error", str(program), *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


FORKS = """
    import os, subprocess, sys
    from shmcache import Cache

    name = sys.argv[1]
    cache = Cache(name, max_bytes="1MB")
    cache.set("parent", 1)

    def child(leave):
        pid = os.fork()
        if pid == 0:
            assert cache.get("parent") == 1
            cache.incr("children", initial=0)
            grandchild = os.fork()
            if grandchild == 0:
                Cache(name).incr("grandchildren", initial=0)
                os._exit(0)
            assert os.waitpid(grandchild, 0)[1] == 0
            leave()
            raise SystemExit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert cache.get("parent") == 1

    child(lambda: None)
    child(lambda: os._exit(0))
    child(cache.close)
    child(lambda: (Cache(name).close(), cache.close()))

    program = "import sys; from shmcache import *; c = Cache(sys.argv[1]); c.incr('strangers', initial=0)"
    for leave in ("", "; c.close()", "; import os; os._exit(0)", "; sys.exit(0)", "; del c"):
        subprocess.run([sys.executable, "-W", "error", "-c", program + leave, name], check=True)
    argv = [sys.executable, "-W", "error", "-c", program, name]
    assert os.waitpid(os.posix_spawn(sys.executable, argv, os.environ), 0)[1] == 0
    print(cache.get_many(["children", "grandchildren", "strangers"]), cache.stats().processes, cache.check())
"""


def test_fork_subprocess_and_posix_spawn(name: str) -> None:
    with Cache(name, max_bytes="1MB") as cache:
        output = run_python(textwrap.dedent(FORKS), name)
        assert output == "{'children': 4, 'grandchildren': 4, 'strangers': 6} 2 []\n"
        assert cache.get("children") == 4


def test_a_pickled_cache_is_the_same_cache(name: str) -> None:
    with Cache(name, max_bytes="1MB", default_ttl=60) as cache, Family() as family:
        cache.set("key", "value")
        other = family.python()
        other.ask(f"(c := __import__('pickle').loads({pickle.dumps(cache)!r}))")
        assert other.ask("c.get('key')") == "value"
        assert other.ask("c.default_ttl") == 60.0
        assert other.finish() == (0, "")


def test_a_forked_child_counts_as_itself(make_cache: Callable[..., Cache]) -> None:
    """Its counters, its place in the process table and its locks are its own, whichever object it uses."""
    cache = make_cache(max_bytes=SMALL)
    cache.set("key", 1)

    def inherited() -> None:
        assert cache.get("key") == 1
        assert [process.pid for process in cache.stats().attached] == sorted([os.getppid(), os.getpid()])

    def anew() -> None:
        with Cache(cache.name) as own:
            assert own.get("key") == 1
            assert [process.pid for process in own.stats().attached] == sorted([os.getppid(), os.getpid()])
            owners = own._attachment.member.owner
            assert owners >> 48 != 0

    for work in (inherited, anew):
        assert Child(work).wait() == 0
    assert cache.get("key") == 1
    stats = cache.stats()
    assert (stats.hits, stats.sets, stats.processes) == (3, 1, 1)
    [own] = stats.attached
    assert (own.hits, own.sets) == (1, 1)


# --- leaving --------------------------------------------------------------------------------------------------------
def test_processes_leave_in_every_order_and_way(name: str) -> None:
    """The first one of three is the creator. The cache survives them all, and nobody prints a thing."""
    for number, order in enumerate(itertools.permutations(range(3))):
        with Family() as family:
            processes = [family.python() for _ in range(3)]
            for process in processes:
                process.tell(f"(c := Cache({name!r}, max_bytes={SMALL}))")
            for process in processes:
                assert name in process.answer()
            processes[0].ask("c.set('key', 'value')")
            remaining = list(order)
            for position in order:
                WAYS_TO_LEAVE[(number + position) % len(WAYS_TO_LEAVE)](processes[position])
                remaining.remove(position)
                for other in remaining:
                    assert processes[other].ask("c.get('key')") == "value"
                    assert processes[other].ask("c.stats().processes") == len(remaining)
        with Cache.attach(name) as cache:
            assert cache.get("key") == "value"
            assert cache.check() == []
            assert cache.stats().processes == 1
        segment.unlink(name)


# --- unlinked behind our back ---------------------------------------------------------------------------------------
def unlink_segment(name: str) -> None:
    (Path(segment.DIRECTORY) / segment.file_name(name)).unlink()


def unlink_lock_file(name: str) -> None:
    Path(segment.lock_path(name)).unlink()


def unlink_everything(name: str) -> None:
    for file in files(name):
        (Path(segment.DIRECTORY) / file).unlink()


@pytest.mark.parametrize("unlink", [unlink_segment, unlink_lock_file, unlink_everything, segment.unlink])
def test_processes_meet_again_when_the_files_are_unlinked(name: str, unlink: Callable[[str], object]) -> None:
    """Four processes go on using the cache; each notices within the interval of its checks, and says so once."""
    with Family() as family:
        processes = [family.python() for _ in range(4)]
        for process in processes:
            process.ask(f"(c := Cache({name!r}, max_bytes={SMALL}))")
        for number, process in enumerate(processes):
            process.ask(f"c.set('before {number}', {number})")
        inode = os.stat(Path(segment.DIRECTORY) / segment.file_name(name)).st_ino
        unlink(name)

        def have_met() -> bool:
            for number, process in enumerate(processes):
                process.ask(f"c.set({number}, {number})")
            return all(process.ask("sorted(c.get_many(range(4)))") == [0, 1, 2, 3] for process in processes) and all(
                process.ask("c.get('before 0')") is None for process in processes
            )

        took = until(have_met, 5)
        print(f"met again after {took * 1e3:.0f} ms")
        assert took < 1
        assert os.stat(Path(segment.DIRECTORY) / segment.file_name(name)).st_ino != inode
        # They know each other's locks: nobody is taken for dead.
        pids = sorted(process.pid for process in processes)
        for process in processes:
            assert process.ask("sorted(each.pid for each in c.stats().attached)") == pids
            assert process.ask("c.check()") == []
        for process in processes:
            code, errors = process.finish()
            assert code == 0
            assert errors.count("unlinked") == 1, errors
            assert "Traceback" not in errors
            assert name in errors


def test_a_process_that_moved_to_a_new_cache_is_not_robbed(name: str) -> None:
    """After its move others still see that it lives: a lock it holds is waited for."""
    with Cache(name, max_bytes=SMALL, shards=1) as cache, Family() as family:
        other = family.python()
        other.ask(f"(c := Cache({name!r}, lock_timeout=0.2))")
        cache.set("before", 1)
        unlink_segment(name)
        until(lambda: cache.get("before") is None and other.ask("c.get('before')") is None, 5)
        cache.set("key", 1)
        assert other.ask("c.get('key')") == 1
        word = cache._attachment.geometry.region(0).header + layout.S_LOCK
        cache._attachment.words[word] = cache._attachment.member.owner
        assert "LockTimeout" in other.ask("c.set('key', 3)")
        cache._attachment.words[word] = 0
        assert other.ask("c.set('key', 3)") is None
        assert cache.get("key") == 3
        other.finish()


# --- the process table ----------------------------------------------------------------------------------------------
def test_200_processes_come_and_go_in_64_places(name: str) -> None:
    """Lines of the dead are used again, and what they counted stays in the totals."""
    rng = random.Random(3)
    expected = {"hits": 0, "misses": 0, "sets": 0, "deletes": 0}

    def work(counts: dict[str, int], end: str) -> None:
        with Cache(name) as cache:
            for _ in range(counts["sets"]):
                cache.set("key", "value")
            for _ in range(counts["hits"]):
                assert cache.get("key") == "value"
            for _ in range(counts["misses"]):
                assert cache.get("missing") is None
            for number in range(counts["deletes"]):
                assert cache.delete(f"to delete {number}")
            [own] = [process for process in cache.stats().attached if process.pid == os.getpid()]
            assert {key: getattr(own, key) for key in counts} == counts, "it did not begin at 0"
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "exit":
                os._exit(0)

    with no_gc(), Cache(name, max_bytes=SMALL, max_entries=64) as cache, Family() as family:
        assert cache._attachment.geometry.processes == 64
        for number in range(200):
            counts = {key: rng.randint(1, 5) for key in expected}
            for each in range(counts["deletes"]):
                cache.set(f"to delete {each}", 1)
            expected["sets"] += counts["deletes"]
            for key, value in counts.items():
                expected[key] += value
            end = ("close", "exit", "kill")[number % 3]
            assert family.fork(work, counts, end).wait() == (-signal.SIGKILL if end == "kill" else 0)
            if number % 20 == 0:
                assert totals(cache) == expected
        assert totals(cache) == expected
        stats = cache.stats()
        assert stats.processes == 1
        assert [process.pid for process in stats.attached] == [os.getpid()]


def totals(cache: Cache) -> dict[str, int]:
    stats = cache.stats()
    return {key: getattr(stats, key) for key in ("hits", "misses", "sets", "deletes")}


def test_totals_of_live_processes_are_the_sum_of_what_they_counted(name: str) -> None:
    with Cache(name, max_bytes=SMALL) as cache, Family() as family:
        processes = [family.python() for _ in range(4)]
        for process in processes:
            process.ask(f"(c := Cache({name!r}))")
        for number, process in enumerate(processes):
            process.ask(f"[c.set(('key', {number}), 1) for _ in range({number + 1})]")
        for number, process in enumerate(processes):
            process.ask(f"[c.get(('key', each)) for each in range({number + 2})]")
        stats = cache.stats()
        attached = {each.pid: each for each in stats.attached}
        for number, process in enumerate(processes):
            own = attached[process.pid]
            assert (own.sets, own.hits, own.misses) == (number + 1, min(number + 2, 4), max(0, number - 2))
        assert totals(cache) == {"hits": 13, "misses": 1, "sets": 10, "deletes": 0}
        assert stats.hit_ratio == 13 / 14
        processes[3].kill()
        processes[2].finish()
        assert totals(cache) == {"hits": 13, "misses": 1, "sets": 10, "deletes": 0}
        assert cache.stats().processes == 3


def test_a_full_process_table_is_an_error_until_somebody_leaves(name: str) -> None:
    gate = Gate()
    told, tell = os.pipe()

    def work() -> None:
        with Cache(name) as cache:
            cache.set("key", 1)
            os.write(tell, b".")
            gate.wait()

    with no_gc(), Cache(name, max_bytes=SMALL) as cache, Family() as family:
        children = [family.fork(work) for _ in range(63)]
        for _ in children:
            assert read(told) == b"."
        assert cache.stats().processes == 64
        one_more = family.python()
        answer = one_more.ask(f"(c := Cache({name!r}))")
        assert TooManyProcesses.__name__ in answer
        assert "64" in answer
        children[17].kill()
        one_more.ask(f"(c := Cache({name!r}))")
        assert one_more.ask("c.get('key')") == 1
        assert cache.stats().processes == 64
        gate.open()
        assert sorted(child.wait() for child in children) == [-signal.SIGKILL] + [0] * 62
    os.close(told)
    os.close(tell)


# --- other versions of Python ---------------------------------------------------------------------------------------
OTHER_PYTHONS = [python for python in os.environ.get("SHMCACHE_OTHER_PYTHONS", "").split(os.pathsep) if python]

VALUES: list[Any] = [
    None,
    True,
    -1,
    2**63 - 1,
    2**70,
    1.5,
    "täxt",
    b"\x00\xff",
    "long" * 50_000,
    ("a", ["tuple", {"of": {1, 2}}]),
    {"a": {"b": [1, 2.5, None]}},
    {"x", "y"},
]


@pytest.mark.skipif(not OTHER_PYTHONS, reason="SHMCACHE_OTHER_PYTHONS names no interpreters that have shmcache")
@pytest.mark.parametrize("python", OTHER_PYTHONS)
def test_another_version_of_python_shares_the_cache(name: str, python: str) -> None:
    """Whoever creates it: each reads what the other wrote, in all types, and hashes keys alike."""
    keys: list[Any] = ["text", b"bytes", 7, -(2**62), 1.5, None, True, ("a", 1, ("b", None))]
    with Family() as family:
        other = family.python(python)
        assert other.ask("is_compiled()") is is_compiled(), "it has to be installed there in the same way"
        assert other.ask("sys.version_info[:2]") != sys.version_info[:2]
        for other_creates in (False, True):
            if other_creates:
                other.ask(f"(c := Cache({name!r}, max_bytes='4MB'))")
            with Cache(name, max_bytes="4MB") as cache:
                if not other_creates:
                    other.ask(f"(c := Cache({name!r}, max_bytes='4MB'))")
                for number, value in enumerate(VALUES):
                    cache.set(("here", number), value)
                    assert other.ask(f"c.get(('here', {number}))") == value
                    other.ask(f"c.set(('there', {number}), {value!r})")
                    assert cache.get(("there", number)) == value
                    assert type(cache.get(("there", number))) is type(value)
                for key in keys:
                    other.ask(f"c.set({key!r}, 'there')")
                    assert cache[key] == "there"
                    cache[key] = "here"
                    assert other.ask(f"c[{key!r}]") == "here"
                for _ in range(100):
                    other.tell("c.incr('n', initial=0)")
                    cache.incr("n", initial=0)
                for _ in range(100):
                    other.answer()
                assert cache.get("n") == 200
                assert other.ask("c.check()") == cache.check() == []
                assert other.ask("c.stats().processes") == cache.stats().processes == 2
                assert other.ask("c.close()") is None
            segment.unlink(name)
        assert other.finish() == (0, "")
