"""A million entries, and the time of a read: figures for the test log, and what must hold whatever the machine."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cachetools
import pytest

from shmcache import Cache, is_compiled, segment

COMPILED = is_compiled()
GIB = 2**30


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def reserved(name: str) -> int:
    """What the files of a cache take of /dev/shm, bytes."""
    return sum(path.stat().st_blocks * 512 for path in Path(segment.DIRECTORY).glob(f"*{name}*"))


def key_of(number: int) -> str:
    return f"{number:050}"


def value_of(number: int) -> bytes:
    return f"{number:032}".encode() * 32


def test_a_million_entries_in_2_gib(make_cache: Callable[..., Cache], show: Callable[[str], None]) -> None:
    """50-byte keys and 1 KiB values. Uncompiled, a fiftieth of it in a cache of the same shape."""
    entries, max_bytes = (1_000_000, 2 * GIB) if COMPILED else (20_000, 2 * GIB // 50)
    needed = max_bytes + GIB // 2
    if shutil.disk_usage(segment.DIRECTORY).free < needed:
        pytest.skip(f"{segment.DIRECTORY} has less than {needed / GIB:.1f} GiB free")
    assert len(key_of(0).encode()) == 50
    assert len(value_of(0)) == 1024
    cache = make_cache(max_bytes=max_bytes, max_entries=entries)
    most = reserved(cache.name)

    began = time.perf_counter()
    for number in range(entries):
        cache.set(key_of(number), value_of(number))
        if number % (entries // 20) == 0:
            most = max(most, reserved(cache.name))
    filled = time.perf_counter() - began
    most = max(most, reserved(cache.name))
    assert most <= max_bytes
    assert len(cache) == entries

    began = time.perf_counter()
    for number in range(entries):
        assert cache.get(key_of(number)) == value_of(number), number
    was_read = time.perf_counter() - began

    stats = cache.stats()
    assert (stats.evictions, stats.expirations, stats.hits, stats.misses) == (0, 0, entries, 0)
    assert stats.bytes_used >= entries * (50 + 1024)

    # And past the bound: one more entry evicts one, and no more memory is taken.
    for number in range(entries, entries + 1000):
        cache.set(key_of(number), value_of(number))
    assert cache.get(key_of(entries + 999)) == value_of(entries + 999)
    assert len(cache) <= entries
    assert reserved(cache.name) == most
    began = time.perf_counter()
    assert cache.check() == []
    checked = time.perf_counter() - began
    show(
        f"{entries:,} entries: filled in {filled:.1f} s, read in {was_read:.1f} s, checked in {checked:.1f} s; "
        f"{most / 2**20:,.1f} of {max_bytes / 2**20:,.1f} MiB in {stats.shards} shards"
    )


def per_call(call: Callable[[str], object], key: str, calls: int) -> float:
    """Nanoseconds that one call takes, loop included."""
    repeat = range(calls)
    began = time.perf_counter_ns()
    for _ in repeat:
        call(key)
    return (time.perf_counter_ns() - began) / calls


@pytest.mark.usefixtures("no_collections")
def test_a_read_hit_takes_less_time_than_cachetools(
    make_cache: Callable[..., Cache], show: Callable[[str], None]
) -> None:
    """A str of 20 characters, from among 1,000 entries with a time to live: medians of repeats that take turns."""
    cache = make_cache(max_bytes="16MB", default_ttl=3600)
    theirs: cachetools.TTLCache[str, str] = cachetools.TTLCache(maxsize=10_000, ttl=3600)
    for number in range(1000):
        cache.set(f"key {number}", f"{number:020}")
        theirs[f"key {number}"] = f"{number:020}"
    key = "key 500"
    assert cache.get(key) == theirs.get(key) == f"{500:020}"
    calls = 20_000 if COMPILED else 500
    ours_ns, theirs_ns = [], []
    for _ in range(15):
        ours_ns.append(per_call(cache.get, key, calls))
        theirs_ns.append(per_call(theirs.get, key, calls))
    ours, other = statistics.median(ours_ns), statistics.median(theirs_ns)
    show(f"{ours:.0f} ns, cachetools.TTLCache {other:.0f} ns ({other / ours:.1f} times as long)")
    assert cache.stats().hits == 15 * calls + 1
    if COMPILED:
        assert ours < other
