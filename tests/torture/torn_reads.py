"""Readers without a lock against writers that never rest: no value is ever half of one and half of another.

A value repeats one word of eight bytes, or one byte if it is shorter, so that a reader sees by itself whether it is
whole.
"""

from __future__ import annotations

import itertools
import mmap
import random
from collections.abc import Iterator

from shmcache import Cache, is_compiled
from tests.processes import Family, no_gc
from tests.torture.campaign import Part, Trial

KEYS = 12
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


def write(cache: Cache, seed: str) -> None:
    rng = random.Random(seed)
    for number in itertools.count():
        key = rng.randrange(KEYS)
        # Small values are written far more often, so that a read of them has a writer to meet.
        size = size_of(rng) if key < 4 else 1 + rng.randrange(200)
        if rng.randrange(50) == 0:
            cache.delete(key)
        cache.set(key, make(rng.randrange(1 << 60) + number, size))


def read(cache: Cache, rng: random.Random, count: int) -> None:
    for _ in range(count):
        value = cache.get(rng.randrange(KEYS))
        assert value is None or is_whole(value), f"a torn value of {len(value)} bytes: {value[:64]!r}"


def read_for_ever(cache: Cache, seed: str, done: mmap.mmap) -> None:
    rng = random.Random(seed)
    for number in itertools.count(1):
        read(cache, rng, 100)
        done[:] = number.to_bytes(8, "big")


def rounds(trial: Trial) -> Iterator[None]:
    """A round is a few thousand reads of this process; another one reads as well."""
    done = mmap.mmap(-1, 8)
    before = 0
    with no_gc(), trial.cache(max_bytes=16 * LARGEST, max_entries=64, shards=1) as cache, Family() as family:
        children = [family.fork(write, cache, f"{trial.seed}-{number}") for number in range(WRITERS)]
        children += [family.fork(read_for_ever, cache, f"{trial.seed}-r{number}", done) for number in range(READERS)]
        while True:
            read(cache, trial.rng, ROUND)
            elsewhere = int.from_bytes(done[:], "big") * 100
            trial.count("reads", ROUND + elsewhere - before)
            before = elsewhere
            for child in children:
                child.poll()
            yield


PART = Part(
    claim="no reader ever sees a torn value",
    rounds=rounds,
    short=60,
)
