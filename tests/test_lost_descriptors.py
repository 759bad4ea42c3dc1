"""A process that closes descriptors which it has not opened, as daemons do, loses its locks, and nobody loses more."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable

import pytest

from shmcache import Cache, LockTimeout
from shmcache.engine import layout
from shmcache.engine.membership import pid_namespace, started
from shmcache.engine.primitives import load, store
from tests.conftest import Clock
from tests.holders import hold
from tests.processes import Child, Family, Gate, until
from tests.test_machine import in_child, listen, open_files


def close_all() -> None:
    os.closerange(3, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def test_it_attaches_anew_once(name: str) -> None:
    """What is opened anew gets the numbers of what was lost, and is not closed with it."""

    def work() -> None:
        said, clock = listen(), Clock()
        cache = Cache(name, max_bytes="1MB", clock=clock)
        cache.set("key", "value")
        close_all()
        clock.advance(1)
        assert cache.get("key") == "value"
        after = open_files()
        for _ in range(10):
            clock.advance(1)
            assert cache.get("key") == "value"
            assert cache.stats().processes == 1
        assert open_files() == after
        assert len(said) == 1
        with Cache(name) as second:
            assert second.get("key") == "value"
        assert cache._attachment.is_current()

    in_child(work)


def test_an_older_attachment_closes_nothing_of_a_newer_one(name: str) -> None:
    def work() -> None:
        first = Cache(name, max_bytes="1MB")
        close_all()
        second = Cache(name)
        first.close()
        assert second._attachment.is_current()
        second.set("key", "value")
        assert second.get("key") == "value"

    in_child(work)


@pytest.mark.parametrize("write", ["set", "incr", "get_or_set", "set_many"])
def test_it_writes_on_at_once(name: str, write: str) -> None:
    """Before it has looked again what has become of its files."""

    def work() -> None:
        cache = Cache(name, max_bytes="1MB", clock=Clock())
        cache.set("number", 1)
        cache.get("number")
        close_all()
        writes: dict[str, Callable[[], object]] = {
            "set": lambda: cache.set("number", 2),
            "incr": lambda: cache.incr("number"),
            "get_or_set": lambda: cache.get_or_set("another", lambda: 2),
            "set_many": lambda: cache.set_many({"number": 2}),
        }
        writes[write]()
        assert cache.get("another" if write == "get_or_set" else "number") == 2
        assert cache.check() == []

    in_child(work)


def test_the_lock_of_one_that_runs_is_not_taken_from_it(name: str) -> None:
    """Though the kernel shows its byte as free. Once it has been killed it is."""
    with Cache(name, max_bytes="1MB", shards=1, lock_timeout=0.1) as cache, Family() as family:
        cache.set("key", "value")
        child = family.fork(hold, cache, lambda _: close_all())
        child.wait_until_stopped()
        owner = load(cache._attachment.words, cache._attachment.geometry.region(0).header + layout.S_LOCK)
        registry = cache._attachment.registry
        assert owner >> 48 not in registry.live_lines()  # its byte is free
        assert registry.is_alive(owner)
        with pytest.raises(LockTimeout, match=rf"is {child.pid}: is it stopped"):
            cache.set("key", "another")
        child.signal(signal.SIGKILL)
        child.wait()
        assert not registry.is_alive(owner)
        cache.set("key", "another")
        assert cache.stats().recoveries == 1
        assert cache.check() == []


def test_the_line_of_one_that_runs_is_not_taken_from_it(name: str) -> None:
    gate = Gate()
    with Cache(name, max_bytes="1MB", shards=1) as cache, Family() as family:
        words, registry = cache._attachment.words, cache._attachment.registry

        def run() -> None:
            cache.set("key", "value")
            store(words, registry.line(5) + layout.P_PID, cache._attachment.registry.own_line)
            close_but(gate)
            gate.wait()

        child = family.fork(run)
        until(lambda: load(words, registry.line(5) + layout.P_PID))
        line = load(words, registry.line(5) + layout.P_PID)
        until(lambda: line not in registry.live_lines())
        for each in set(range(registry.processes)) - {registry.own_line, line}:
            store(words, registry.line(each) + layout.P_PID, 1 << 40)  # of a process that was killed
        generation = load(words, registry.line(line) + layout.P_GENERATION)
        for _ in range(3):
            assert family.fork(lambda: cache.set("key", "value")).wait() == 0
        assert load(words, registry.line(line) + layout.P_GENERATION) == generation
        gate.open()
        assert child.wait() == 0
        family.fork(lambda: cache.set("key", "value")).wait()


def close_but(gate: Gate) -> None:
    for number in map(int, open_files()):
        if number > 2 and number not in (gate._read, gate._write):
            with contextlib.suppress(OSError):  # what listed them is closed
                os.close(number)


def test_who_runs_is_known_by_pid_and_start() -> None:
    assert started(os.getpid()) == started(os.getpid()) > 0
    assert pid_namespace() > 0
    gate = Gate()
    child = Child(gate.wait)
    assert started(child.pid) >= started(os.getpid())
    child.signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert started(child.pid) == 0  # a zombie
    child.wait()
    assert started(child.pid) == 0
