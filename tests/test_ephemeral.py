"""Ephemeral caches: they go with the last process that has them, however it goes, and not before."""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shmcache import Cache, LockTimeout, reaper, reaper_process, segment
from tests.processes import (
    WAYS_TO_LEAVE,
    Child,
    Family,
    Gate,
    Interpreter,
    files,
    leave_by_sigkill,
    read,
    until,
)

SMALL = 256 * 1024


def reapers(name: str) -> list[psutil.Process]:
    """The processes that wait to remove a cache."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(f"{segment.file_name(name)}~" in argument for argument in process.cmdline()[1:]):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for a parent to ask how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
def test_an_ephemeral_cache_goes_with_its_last_process(name: str, leave: Callable[[Interpreter], None]) -> None:
    create = f"(c := Cache({name!r}, max_bytes={SMALL}, ephemeral=True))"
    with Family() as family:
        processes = [family.python() for _ in range(3)]
        for process in processes:
            process.ask(create)
        processes[0].ask("c.set('key', 'value')")
        until(lambda: len(reapers(name)) == 1, 5)
        program, lock_file = reapers(name)[0].cmdline()[-2:]
        assert (Path(program).name, lock_file) == ("reaper_process.py", str(segment.lock_path(name)))
        for process in processes[:2]:
            leave(process)
            assert files(name) != []
            assert processes[2].ask("c.get('key')") == "value"
        leave(processes[2])
        until(lambda: files(name) == [], 5)
        until(lambda: reapers(name) == [], 5)

        again = family.python()
        again.ask(create)
        assert again.ask("c.get('key')") is None
        again.ask("c.set('key', 'new')")
        assert again.ask("c.check()") == []
        leave(again)
        until(lambda: files(name) == [], 5)
        until(lambda: reapers(name) == [], 5)


def test_a_reaper_that_is_told_to_terminate_with_everybody_else_still_removes_the_cache(name: str) -> None:
    """As when a service is stopped: systemd sends SIGTERM to every process of its control group."""
    with Family() as family:
        users = [family.python() for _ in range(2)]
        for user in users:
            user.ask(f"(c := Cache({name!r}, max_bytes={SMALL}, ephemeral=True))")
        until(lambda: len(reapers(name)) == 1, 5)
        [waiting] = reapers(name)
        waiting.terminate()
        users[0].process.terminate()
        until(lambda: has_ended(users[0].pid))
        assert users[1].ask("c.check()") == []
        leave_by_sigkill(users[1])
        until(lambda: files(name) == [], 5)
        until(lambda: reapers(name) == [], 5)


def test_a_reaper_that_is_told_to_terminate_does_so_in_the_end_when_others_go_on(name: str) -> None:
    def alarm() -> None:
        reaper_process.terminate_later()
        assert 0 < signal.alarm(0) <= reaper_process.PATIENCE

    with Family() as family:
        assert family.fork(alarm).wait() == 0
        user = family.python()
        user.ask(f"(c := Cache({name!r}, max_bytes={SMALL}, ephemeral=True))")
        until(lambda: len(reapers(name)) == 1, 5)
        [waiting] = reapers(name)
        waiting.send_signal(signal.SIGALRM)
        until(lambda: has_ended(waiting.pid))
        assert files(name) != []
        assert user.ask("c.check()") == []
        user.ask("c.close()")
        assert files(name) == []


def test_a_reaper_that_cannot_be_started_is_a_warning(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with (tmp_path / "lock").open("w") as lock:
        reaper.start_reaper(lock.fileno(), [str(tmp_path)])  # a directory is no lock file
    assert "no reaper could be started" in caplog.text
    assert "exit status 1" in caplog.text
    assert reapers(name) == []


@pytest.mark.parametrize("leave", ["close", "exit", "kill"])
def test_a_forked_child_that_did_nothing_yet_keeps_an_ephemeral_cache_alive(name: str, leave: str) -> None:
    """As when a process forks twice to become a daemon: its parent is gone before the child's first operation."""
    gate = Gate()

    def work(cache: Cache) -> None:
        gate.wait()
        assert cache.get("key") == "value"

    def parent() -> None:
        cache = Cache(name, max_bytes=SMALL, ephemeral=True)
        cache.set("key", "value")
        os.write(tell, str(Child(work, cache).pid).encode())
        if leave == "close":
            cache.close()
        elif leave == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            atexit._run_exitfuncs()

    told, tell = os.pipe()
    with Family() as family:
        family.fork(parent).wait()
        pid = int(read(told, 20))
        assert files(name) != []
        until(lambda: len(reapers(name)) == 1, 5)
        assert files(name) != []
        gate.open()
        until(lambda: has_ended(pid))
        until(lambda: files(name) == [], 5)
        until(lambda: reapers(name) == [], 5)
    os.close(told)
    os.close(tell)


def test_a_reaper_that_was_stopped_while_it_looked_keeps_nobody_out_for_long(name: str) -> None:
    """Longer than `lock_timeout`, that is: it has the lock file to itself then. Here this test is it."""
    told, tell = os.pipe()

    def work() -> None:
        with Cache(name, max_bytes=SMALL, ephemeral=True):
            os.write(tell, b"!")  # it has its reaper
            signal.pause()

    with Family() as family:
        child = family.fork(work)
        read(told)
        [reaper] = reapers(name)
        reaper.kill()
        child.signal(signal.SIGKILL)
        child.wait()
    os.close(told)
    os.close(tell)
    until(lambda: not psutil.pid_exists(reaper.pid) or has_ended(reaper.pid))
    with open(segment.lock_path(name)) as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with pytest.raises(LockTimeout, match=r"kept everybody out for 0\.2 s"):
            Cache(name, max_bytes=SMALL, lock_timeout=0.2)
    Cache(name, max_bytes=SMALL).unlink()  # it was left over, and is a new one


def test_an_ephemeral_cache_outlives_those_that_attach_to_it_and_go(name: str) -> None:
    with Family() as family:
        creator = family.python()
        creator.ask(f"(c := Cache({name!r}, max_bytes={SMALL}, ephemeral=True))")
        creator.ask("c.set('key', 'value')")
        for leave in WAYS_TO_LEAVE:
            visitor = family.python()
            assert visitor.ask(f"(c := Cache.attach({name!r})).get('key')") == "value"
            leave(visitor)
            assert creator.ask("c.get('key')") == "value"
        until(lambda: len(reapers(name)) == 1, 5)
        assert files(name) != []
        leave_by_sigkill(creator)
        until(lambda: files(name) == [], 5)


def test_forked_children_keep_an_ephemeral_cache_alive(name: str) -> None:
    gate = Gate()

    def work(cache: Cache) -> None:
        cache.set("from the child", 1)
        gate.wait()
        assert cache.get("from the child") == 1

    def parent() -> None:
        cache = Cache(name, max_bytes=SMALL, ephemeral=True)
        child = Child(work, cache)
        until(lambda: cache.get("from the child") == 1)
        cache.close()
        os.write(tell, str(child.pid).encode())

    told, tell = os.pipe()
    with Family() as family:
        assert family.fork(parent).wait() == 0
        pid = int(read(told, 20))
        assert files(name) != []
        with Cache.attach(name) as cache:
            assert cache.get("from the child") == 1
            assert {process.pid for process in cache.stats().attached} == {pid, os.getpid()}
        assert files(name) != []
        gate.open()
        until(lambda: files(name) == [], 5)
        until(lambda: reapers(name) == [], 5)
    os.close(told)
    os.close(tell)
