"""What every test shares: caches of its own that are checked and removed at its end, and a clock that it turns."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmcache import Cache, CacheClosed, segment

# Whoever starts the tests in the background may have Ctrl-C ignored, which child processes would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = itertools.count()


class Clock:
    """A clock in ns that moves when told to. It begins at a million seconds, as after eleven days of uptime."""

    def __init__(self) -> None:
        self.now = 1_000_000 * 10**9

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def new_name() -> str:
    """A cache name that no other test, and no other test run, uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def name() -> Iterator[str]:
    """A fresh cache name; whatever cache has it at the end of the test is checked and removed."""
    name = new_name()
    yield name
    try:
        with contextlib.suppress(LookupError), Cache.attach(name) as cache:
            assert cache.check() == []
    finally:
        segment.unlink(name)


@pytest.fixture
def make_cache() -> Iterator[Callable[..., Cache]]:
    """Makes caches with fresh names; at the end of the test each one's `check()` must be clean."""
    made: list[Cache] = []

    def make(name: str | None = None, **options: Any) -> Cache:
        cache = Cache(name or new_name(), **options)
        made.append(cache)
        return cache

    yield make
    problems: list[str] = []
    for cache in made:
        try:
            with contextlib.suppress(CacheClosed):
                problems += cache.check()
        finally:
            cache.close()
            segment.unlink(cache.name)
    assert problems == []


def files_left() -> list[str]:
    """Files of this test process's caches in /dev/shm."""
    return sorted(path.name for path in Path(segment.DIRECTORY).glob(f"*test-{os.getpid()}-*"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a segment, a lock file or a semaphore behind."""
    yield
    assert files_left() == []


# --- figures --------------------------------------------------------------------------------------------------------
@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Put a line into the test log, whether or not the test passes: all such lines stand together at its end."""

    def line(text: str) -> None:
        record_property("figure", text)

    return line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [
        (report.nodeid.partition("::")[2], text)
        for report in reports
        if report.when == "call"
        for what, text in report.user_properties
        if what == "figure"
    ]
    if figures:
        terminalreporter.section("figures of this machine")
    for test, text in sorted(figures):
        terminalreporter.line(f"{test}: {text}")
