"""Forks, and ends of processes, at awkward moments: among threads, within an operation, while the interpreter ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

from shmcache import Cache, LockTimeout, SegmentTooLarge, is_compiled, segment
from shmcache.engine.bytelock import under_setup_lock
from tests.conftest import Clock, new_name
from tests.holders import hold, owner, waiters
from tests.processes import DEADLINE, Family, environment, files, no_gc, read, run_python, until

SMALL = 256 * 1024


def run_threads(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own, all at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


# --- among threads --------------------------------------------------------------------------------------------------
def test_forks_while_other_threads_are_in_operations(make_cache: Callable[..., Cache]) -> None:
    """A child has none of the parent's locks, nor waits for threads that it has not: 24 of them, forked by a thread."""
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=1)
    cache.set("kept", "value")
    done = threading.Event()
    counted = [0] * 3

    def hammer(number: int) -> None:
        while not done.is_set():
            cache.incr("total", initial=0)
            counted[number] += 1
            cache.set_many({(number, each): b"x" * 500 for each in range(4)})
            assert cache.get("kept") == "value"

    def child() -> None:
        for _ in range(3):
            cache.incr("total", initial=0)
        assert cache.get("kept") == "value"
        with Cache(cache.name) as own:
            own.incr("total", initial=0)

    def fork() -> None:
        try:
            with no_gc(), Family() as family:
                for _ in range(8):
                    assert [each.wait() for each in [family.fork(child) for _ in range(3)]] == [0] * 3
        finally:
            done.set()

    run_threads(fork, *[lambda number=number: hammer(number) for number in range(3)])
    assert cache.get("total") == sum(counted) + 24 * 4
    stats = cache.stats()
    assert (stats.processes, stats.recoveries) == (1, 0)


def test_a_fork_while_another_thread_attaches(make_cache: Callable[..., Cache]) -> None:
    """The child is free to attach elsewhere; where its parent is attaching it waits, as any other process."""
    cache = make_cache(max_bytes=SMALL, lock_timeout=0.2)
    elsewhere = new_name()
    within, go_on = threading.Event(), threading.Event()

    def attach() -> None:
        def work() -> None:
            within.set()
            assert go_on.wait(DEADLINE)

        under_setup_lock(cache._attachment.lock_fd, 5, work)

    def child() -> None:
        with Cache(elsewhere, max_bytes=SMALL) as own:
            own.set("key", 1)
            own.unlink()
        with pytest.raises(LockTimeout, match="creating, attaching to or unlinking"):
            cache.set("key", 1)
        os.write(tell, b".")
        cache.set("key", 2)

    def fork() -> None:
        assert within.wait(DEADLINE)
        with Family() as family:
            each = family.fork(child)
            try:
                assert read(told) == b"."
            finally:
                go_on.set()
            assert each.wait() == 0

    told, tell = os.pipe()
    run_threads(attach, fork)
    os.close(told)
    os.close(tell)
    assert cache.get("key") == 2


def test_threads_of_several_processes_some_of_which_are_killed(make_cache: Callable[..., Cache]) -> None:
    """Four processes of three threads: what was acknowledged is there, and at most one more for each dead thread."""
    cache = make_cache(max_bytes="1MB", max_entries=256, shards=1)
    threads, kills = 3, 6

    def work(process: int) -> None:
        def run(thread: int) -> None:
            for number in range(1, 1 << 30):
                if cache.get("stop"):
                    return
                cache.incr("total", initial=0)
                cache.set(f"{process}-{thread}", number)

        run_threads(*[lambda thread=thread: run(thread) for thread in range(threads)])

    def done(process: int) -> list[int]:
        return [cache.get(f"{process}-{thread}", 0) for thread in range(threads)]

    def all_began(processes: int) -> bool:
        return all(all(done(each)) for each in range(processes))

    with no_gc(), Family() as family:
        running = [family.fork(work, number) for number in range(4)]
        for number in range(4, 4 + kills):
            until(partial(all_began, number))
            running.pop(0).kill()
            running.append(family.fork(work, number))
        until(partial(all_began, 4 + kills))
        cache.set("stop", 1)
        assert [each.wait() for each in running] == [0] * 4
    acknowledged = sum(sum(done(each)) for each in range(4 + kills))
    assert acknowledged <= cache.get("total") <= acknowledged + kills * threads
    assert cache.stats().processes == 1


# --- within an operation --------------------------------------------------------------------------------------------
CHILD_OF_A_HANDLER = """
    import os, signal, sys
    from shmcache import Cache, LockTimeout, SegmentTooLarge, is_compiled, segment

    name, what, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    cache = Cache(name, max_bytes="1MB", max_entries=64, shards=1)
    parent, children = os.getpid(), []

    def fork(*_):
        pid = os.fork()
        if pid:
            children.append(pid)
        elif what == "exit":
            sys.exit(0)
        elif what == "raise":
            raise RuntimeError
        elif what == "use":
            cache.incr("children", initial=0)
            cache.set("other", "of the child")
            os._exit(0)

    signal.signal(signal.SIGUSR1, fork)

    def raise_at_store(number):
        # Signal handlers run between any two lines of uncompiled code: here, before a store of an operation.
        from shmcache.engine import blocks, eviction, journal, lock, primitives, shard, table
        calls = 0

        def wrap(real):
            def store(*args):
                nonlocal calls
                calls += 1
                if calls == number:
                    signal.raise_signal(signal.SIGUSR1)
                return real(*args)
            return store

        for module in (blocks, eviction, journal, lock, shard, table):
            for each in ("store", "logged_store", "copy_in", "compare_and_swap", "store_seq_cst"):
                if hasattr(module, each):
                    setattr(module, each, wrap(getattr(primitives, each)))

    print("ready", flush=True)
    sys.stdin.readline()
    if not is_compiled():
        raise_at_store(number)
    code = 0
    try:
        cache.set("key", b"new" * 1000)
        cache.delete("gone")
        if os.getpid() != parent:
            cache.set("from the child", 1)
    except (LockTimeout, RuntimeError, SystemExit) as error:
        if os.getpid() == parent:
            raise
        if what == "return":
            assert isinstance(error, LockTimeout) and "was forked in the midst" in str(error), error
            cache.set("from the child", 1)
    except BaseException as error:
        code = repr(error)
    if os.getpid() != parent:
        if code:
            os.write(2, code.encode())
        os._exit(1 if code else 0)
    cache.set("after", [os.waitpid(pid, 0)[1] for pid in children])
    sys.exit(code)
"""


@pytest.mark.parametrize("what", ["exit", "raise", "use", "return"])
def test_a_child_that_a_signal_handler_forks_within_an_operation(make_cache: Callable[..., Cache], what: str) -> None:
    """It leaves the operation to its parent, however it goes on, and does nothing in its parent's name.

    Compiled, the handler runs while the operation waits for the lock; uncompiled, before one of its stores.
    """
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=1)
    for number in (1,) if is_compiled() else (1, 2, 5, 12, 20, 28):
        cache.clear()
        cache.set_many({"kept": "value", "key": b"old", "gone": 1, "other": 1})
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(CHILD_OF_A_HANDLER), cache.name, what]
        with (
            Family() as family,
            subprocess.Popen(
                [*command, str(number)],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                assert process.stdout.readline() == "ready\n"
                if is_compiled():
                    holder = family.fork(hold, cache)
                    holder.wait_until_stopped()
                process.stdin.write("go\n")
                process.stdin.flush()
                if is_compiled():
                    until(lambda: waiters(cache) > 0)
                    process.send_signal(signal.SIGUSR1)
                    until(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
                    holder.signal(signal.SIGCONT)
                _, errors = process.communicate(timeout=DEADLINE)
            finally:
                process.kill()
            assert (process.returncode, errors) == (0, "")
        assert cache.get("after") == [0], "no child was forked, or it failed"
        assert cache.get("kept") == "value"
        assert cache.get("key") == b"new" * 1000
        assert "gone" not in cache
        assert cache.get("children") == (1 if what == "use" else None)
        assert cache.get("from the child") == (1 if what == "return" else None)
        assert cache.check() == []
        assert owner(cache) == 0
        stats = cache.stats()
        assert (stats.processes, stats.recoveries) == (1, 0)


def test_a_daemon_goes_on_with_the_cache_of_the_process_that_began_it(make_cache: Callable[..., Cache]) -> None:
    """Forked twice, in a session of its own, its ancestors gone, before its first operation."""
    cache = make_cache(max_bytes=SMALL)
    told, tell = os.pipe()

    def begin() -> None:
        with Cache(cache.name) as own:
            own.set("key", "value")
            if os.fork():
                return
            os.setsid()
            leader = os.getpid()
            if os.fork():
                os._exit(0)
            until(lambda: os.getppid() != leader)
            own.incr("daemons", initial=0)
            assert own.get("key") == "value"
            os.write(tell, str(os.getpid()).encode())
            os._exit(0)

    with Family() as family:
        assert family.fork(begin).wait() == 0
        pid = int(read(told, 20))
        until(lambda: pid not in {process.pid for process in cache.stats().attached})
    os.close(told)
    os.close(tell)
    assert cache.get("daemons") == 1


# --- the end of the interpreter -------------------------------------------------------------------------------------
END = """
    import atexit, sys, threading, time
    when, name, ephemeral = sys.argv[1:]

    def last():
        cache.set("last", when)
        assert cache.get("last") == when

    if when in ("before the import", "alone"):
        atexit.register(last)  # what was registered first runs last

    from shmcache import Cache
    cache = Cache(name, max_bytes="1MB", max_entries=256, ephemeral=bool(ephemeral))
    if when == "after the import":
        atexit.register(last)
    busy = threading.Semaphore(0)

    def work(number):
        while True:
            cache.set(number, b"x" * 1000)
            cache.incr("n", initial=0)
            cache.get(number)
            list(cache.keys())
            busy.release()

    if when != "alone":
        for number in range(3):
            threading.Thread(target=work, args=(number,), daemon=True).start()
        for _ in range(9):
            busy.acquire()
    if when == "in a thread":
        threading.Timer(0.01, last).start()
"""


ENDS = ("before the import", "after the import", "in a thread", "with daemon threads")


@pytest.mark.parametrize(
    ("when", "ephemeral"), [("alone", False), *[(when, False) for when in ENDS], *[(when, True) for when in ENDS]]
)
def test_the_interpreter_ends_while_the_cache_is_used(name: str, when: str, ephemeral: bool) -> None:
    """By daemon threads, and by functions that atexit runs before and after ours: no hang, no crash, no message."""
    if ephemeral:
        run_python(textwrap.dedent(END), when, name, "yes")
        until(lambda: files(name) == [])
        return
    with Cache(name, max_bytes="1MB", max_entries=256) as cache:
        run_python(textwrap.dedent(END), when, name, "")
        assert cache.get("last") == (None if when == "with daemon threads" else when)
        assert when == "alone" or cache.get("n") > 0
        assert cache.check() == []
        assert cache.stats().processes == 1


SUB_INTERPRETER = """
    import sys
    if sys.version_info >= (3, 13):
        import _interpreters as interpreters
        run, new = interpreters.exec, interpreters.create("legacy")
    else:
        import _xxsubinterpreters as interpreters
        run, new = interpreters.run_string, interpreters.create(isolated=False)
    attempt = "try:\\n import shmcache\\nexcept ImportError as error:\\n print(error)"
    run(new, f"import sys; sys.path[:] = {sys.path!r}\\n{attempt}")
    import shmcache
    print(shmcache.is_compiled())
"""


def test_a_sub_interpreter_is_refused() -> None:
    """As mod_wsgi makes them. What the kernel locks belongs to the process, which would have two identities."""
    refusal, compiled = run_python(textwrap.dedent(SUB_INTERPRETER)).splitlines()
    assert refusal.startswith("shmcache works in the main interpreter of a process only")
    assert "WSGIApplicationGroup %{GLOBAL}" in refusal
    assert compiled == str(is_compiled())


def test_a_fork_while_a_cache_without_files_is_still_at_hand(
    make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exception keeps what it was attached to; the child does nothing in its parent's name at any other cache."""
    clock = Clock()
    lost, other = make_cache(max_bytes="1MB", clock=clock), make_cache(max_bytes="1MB")

    def no_room(*arguments: object) -> None:
        raise SegmentTooLarge("no room")

    monkeypatch.setattr(segment, "_reserve", no_room)
    monkeypatch.setattr("shmcache.cache.MOVE_PATIENCE", 0.0)
    segment.unlink(lost.name)
    clock.advance(1)
    with Family() as family:
        try:
            lost.stats()
        except SegmentTooLarge:
            child = family.fork(lambda: os._exit(other._attachment.member.owner != 0))
            assert child.wait() == 0
        else:
            raise AssertionError("there was room")
    monkeypatch.undo()


def test_a_child_forked_while_its_thread_waits_for_another_does_not_wait_for_ever(
    make_cache: Callable[..., Cache],
) -> None:
    """The other thread is not in the child, and would never give back what it has."""
    cache = make_cache(max_bytes="1MB")
    mutex, taken, forked = segment.mutex_of(cache.name), threading.Event(), threading.Event()
    parent, handled, children = os.getpid(), threading.Event(), []

    def fork_if_waiting(_number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_name != "attach":
            frame = frame.f_back
        if frame is not None and not handled.is_set():
            handled.set()  # before the fork, which runs Python code, where the next signal may strike
            children.append(os.fork())
            if os.getpid() == parent:
                forked.set()

    def keep_it() -> None:
        with mutex:
            taken.set()
            while not forked.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                forked.wait(0.001)

    before = signal.signal(signal.SIGUSR1, fork_if_waiting)
    thread = threading.Thread(target=keep_it)
    thread.start()
    try:
        taken.wait()
        another = Cache(cache.name)
        if os.getpid() != parent:
            another.set("key", "of the child")
            os._exit(0)
        thread.join()
        until(lambda: os.waitpid(children[0], os.WNOHANG) == (children[0], 0))
        assert another.get("key") == "of the child"
        another.close()
    finally:
        if os.getpid() != parent:
            os._exit(1)
        signal.signal(signal.SIGUSR1, before)
