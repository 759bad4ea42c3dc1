"""Files of a cache are removed while processes use it: they all meet on one new cache, and say that they have moved.

By hand, one by one or all together, as systemd's RemoveIPC does, or by `shmcache unlink`; once, or several times before
the processes had the time to meet.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shmcache import Cache, segment
from shmcache.engine import layout
from tests.processes import Family, no_gc, until
from tests.torture.campaign import Part, Trial

PROCESSES = 5
PATIENCE = 1.0  # seconds from the last removal until all are on one cache again
MOST_REMOVALS = 6  # in a row, and
LONGEST_PAUSE = 0.3  # seconds between two of them: a process looks after 0.25
FIELDS = 4
SEEN, PLACE, MOVES, WARNINGS = range(FIELDS)  # of a process: the last word seen of all, where, and how often it moved


class Board:
    """Numbers that the processes of a round show each other, other than by the cache: its `word`, then four of each."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * (1 + PROCESSES * FIELDS))).cast("Q")

    @property
    def word(self) -> int:
        return self._numbers[0]

    @word.setter
    def word(self, number: int) -> None:
        self._numbers[0] = number

    def put(self, process: int, field: int, number: int) -> None:
        self._numbers[1 + process * FIELDS + field] = number

    def get(self, field: int) -> list[int]:
        return [self._numbers[1 + process * FIELDS + field] for process in range(PROCESSES)]


def rounds(trial: Trial) -> Iterator[None]:
    """A round is a burst of removals, and a meeting."""
    board = Board()
    logging.getLogger("shmcache").addHandler(logging.NullHandler())
    options = {"max_bytes": "1MB", "max_entries": 500, "shards": 1, "ephemeral": trial.rng.random() < 0.5}
    with no_gc(), trial.cache(**options) as cache, Family() as family:
        workers = [family.fork(use, cache.name, options, board, number) for number in range(PROCESSES)]
        meet(board, cache.name)
        while True:
            before = identity(cache.name)
            lost = False
            for number in range(trial.rng.randint(1, MOST_REMOVALS) if trial.rng.random() < 0.5 else 1):
                if number:
                    time.sleep(trial.rng.random() * LONGEST_PAUSE)
                what = trial.rng.choice(list(REMOVALS))
                REMOVALS[what](cache.name)
                trial.count(what)
                lost = lost or what != "semaphores"
            trial.measure("until all met again", meet(board, cache.name))
            assert lost or identity(cache.name) == before, "nothing but semaphores was removed"
            place = identity(cache.name)
            meet(board, cache.name)
            assert identity(cache.name) == place, "they moved once more"
            moves, warnings = board.get(MOVES), board.get(WARNINGS)
            assert all(warned >= moved for moved, warned in zip(moves, warnings, strict=True)), (moves, warnings)
            until(functools.partial(is_at, cache, place))
            assert cache.check() == []
            stats = cache.stats()
            assert stats.processes == PROCESSES + 1
            trial.count("waits for a lock", stats.lock_waits)
            for worker in workers:
                worker.poll()
            yield


def use(name: str, options: dict[str, Any], board: Board, number: int) -> None:
    """Use the cache in every way, and show what is seen of the others."""
    warnings = moves = place = 0

    def warned(_: logging.LogRecord) -> None:
        nonlocal warnings
        warnings += 1
        board.put(number, WARNINGS, warnings)

    handler = logging.Handler()
    handler.emit = warned  # type: ignore[assignment,method-assign]
    logging.getLogger("shmcache").addHandler(handler)
    cache = Cache(name, **options)
    everybody = [f"seen by {each}" for each in range(PROCESSES)]
    while True:
        word = board.word
        cache.set(everybody[number], word)
        cache.set(("large", number), bytes(50_000))
        assert cache.get(("large", number)) in (bytes(50_000), None)
        with cache.batch() as batch:
            batch.set("a", number)
            batch.incr("count", initial=0)
            batch.delete("b")
        cache.incr("count", initial=0)
        for _ in cache:
            pass
        here = place_of(cache)
        if here != place:
            moves += place != 0
            place = here
            board.put(number, MOVES, moves)
        board.put(number, PLACE, here)
        if list(cache.get_many(everybody).values()) == [word] * PROCESSES:
            board.put(number, SEEN, word)


def meet(board: Board, name: str) -> float:
    """Wait until every process sees what all have written to the one cache that has the name; the time it took."""
    board.word += 1
    gaps = [time.monotonic()]

    def have_met() -> bool:
        gaps.append(time.monotonic())
        return {*board.get(SEEN)} == {board.word} and {*board.get(PLACE)} == {identity(name)} != {0}

    took = until(have_met)
    starved = max(later - earlier for earlier, later in itertools.pairwise(gaps))
    assert took < PATIENCE + starved, f"met again after {took:.3f} s"
    return took


def place_of(cache: Cache) -> int:
    """The inode of the segment that a process uses."""
    return os.fstat(cache._attachment.segment_fd).st_ino


def is_at(cache: Cache, place: int) -> bool:
    """Whether this process has moved to the segment with that inode; using the cache is what makes it move."""
    return "count" in cache and place_of(cache) == place


def identity(name: str) -> int:
    """The inode of the segment, if it and its lock file are what the names lead to, else 0."""
    with contextlib.suppress(FileNotFoundError), (Path(segment.DIRECTORY) / segment.file_name(name)).open("rb") as file:
        header = memoryview(file.read(layout.HEADER_WORDS * 8).ljust(layout.HEADER_WORDS * 8, b"\0")).cast("Q")
        if header[layout.H_LOCK_FILE] == Path(segment.lock_path(name)).stat().st_ino:
            return os.fstat(file.fileno()).st_ino
    return 0


def remove(*kinds: str) -> Callable[[str], None]:
    """Something that removes the files of these kinds, in the order of the directory, as far as they are there."""

    def unlink(name: str) -> None:
        own = segment.file_name(name)
        for file in os.listdir(segment.DIRECTORY):
            kind = {own: "segment", f"{own}~lock": "lock file"}.get(file)
            if kind is None and file.startswith(f"sem.{own}~"):
                kind = "semaphores"
            if kind in kinds:
                with contextlib.suppress(FileNotFoundError):
                    (Path(segment.DIRECTORY) / file).unlink()

    return unlink


REMOVALS: dict[str, Callable[[str], object]] = {
    "segment": remove("segment"),
    "lock file": remove("lock file"),
    "semaphores": remove("semaphores"),
    "everything": remove("segment", "lock file", "semaphores"),
    "by `unlink`": segment.unlink,
}

PART = Part(
    claim="whatever of its files is removed, all processes are on one cache again within a second, and have said so",
    rounds=rounds,
    short=4,
)
