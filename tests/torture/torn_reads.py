"""Readers without a lock against writers that never rest: no value is ever half of one and half of another.

A value repeats one word of eight bytes, or one byte if it is shorter, so that a reader sees by itself whether it is
whole.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
from collections.abc import Iterator

from shmcache import Cache, is_compiled
from shmcache.engine import layout
from tests.processes import Family, no_gc
from tests.torture.campaign import Part, Trial

KEYS = 3  # few, so that a read often meets a writer of the same one
WRITERS = 2
READERS = 1  # besides this process
LARGEST = 1 << 20 if is_compiled() else 1 << 12  # bytes
ROUND = 5_000 if is_compiled() else 500  # reads


def make(number: int, size: int) -> bytes:
    if size < 8:
        return bytes([number % 256]) * size
    word = number.to_bytes(8, "big")
    return word * (size // 8)


def is_whole(value: bytes) -> bool:
    width = 8 if len(value) >= 8 else 1
    return value == value[:width] * (len(value) // width)


def size_of(rng: random.Random) -> int:
    """From one byte to the largest; every order of magnitude is equally likely."""
    return int(2 ** (rng.random() * (LARGEST.bit_length() - 1)))


def go_apart(writes: bool) -> None:
    """Writers run on one half of the cores and readers on the other, so that they work at the same moment."""
    cores = sorted(os.sched_getaffinity(0))
    if half := len(cores) // 2:
        os.sched_setaffinity(0, cores[:half] if writes else cores[half:])


def write(cache: Cache, seed: str) -> None:
    go_apart(writes=True)
    rng = random.Random(seed)
    for number in itertools.count():
        key = rng.randrange(KEYS)
        # Mostly what is read quickly, but takes a while to write.
        size = 1 + rng.randrange(4000) if rng.randrange(20) else size_of(rng)
        if rng.randrange(50) == 0:
            cache.delete(key)
        cache.set(key, make(rng.randrange(1 << 60) + number, size))


def read(cache: Cache, rng: random.Random, count: int) -> int:
    """Read that often; how many of the reads met a writer in the midst, and had to begin anew."""
    words, retries = cache._attachment.words, cache._attachment.member.counters + layout.C_READ_RETRIES
    met, before = 0, words[retries]
    for _ in range(count):
        value = cache.get(rng.randrange(KEYS))
        assert value is None or is_whole(value), f"a torn value of {len(value)} bytes: {value[:64]!r}"
        if words[retries] != before:
            met, before = met + 1, words[retries]
    return met


def read_for_ever(cache: Cache, seed: str, done: memoryview) -> None:
    cache._attached()  # take a line of counters of its own
    go_apart(writes=False)
    rng = random.Random(seed)
    while True:
        done[1] += read(cache, rng, 100)
        done[0] += 100


def rounds(trial: Trial) -> Iterator[None]:
    """A round is a few thousand reads of this process; another one reads as well."""
    done = memoryview(mmap.mmap(-1, 16)).cast("Q")  # of the other: reads, and how many met a writer
    before = [0, 0]
    with no_gc(), trial.cache(max_bytes=16 * LARGEST, max_entries=64, shards=1) as cache, Family() as family:
        children = [family.fork(write, cache, f"{trial.seed}-{number}") for number in range(WRITERS)]
        children += [family.fork(read_for_ever, cache, f"{trial.seed}-r{number}", done) for number in range(READERS)]
        go_apart(writes=False)
        while True:
            met = read(cache, trial.rng, ROUND)
            elsewhere = done.tolist()
            trial.count("reads", ROUND + elsewhere[0] - before[0])
            trial.count("reads that met a writer in the midst", met + elsewhere[1] - before[1])
            before = elsewhere
            for child in children:
                child.poll()
            yield


PART = Part(
    claim="no reader ever sees a torn value",
    rounds=rounds,
    short=60,
)
