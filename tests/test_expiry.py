"""Expired entries give their room back in time, whatever their time to live is and however long nobody wrote."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shmcache import Cache, is_compiled
from shmcache.engine import layout
from shmcache.engine.primitives import load
from tests.conftest import Clock

MakeCache = Callable[..., Cache]
RATE = 20 if is_compiled() else 2  # entries a second


@pytest.mark.parametrize("ttl", [30, 300, 600, 1800, 3600, 40_000])
def test_no_more_than_a_tenth_of_the_entries_is_expired(make_cache: MakeCache, clock: Clock, ttl: int) -> None:
    """Entries with a time to live arrive steadily, for longer than that."""
    rate = max(1, RATE * 600 // max(ttl, 600)) if ttl < 40_000 else 0.1
    live = round(ttl * rate)
    cache = make_cache(max_bytes=live * 1024 + 2**20, max_entries=live * 2, shards=1, clock=clock)
    for number in range(round(2.2 * live)):
        clock.advance(1 / rate)
        cache.set(number, None, ttl=ttl)
    assert live <= cache.stats().entries <= live * 1.1 + 5
    assert cache.stats().evictions == 0


def test_what_has_expired_goes_before_what_lives(make_cache: MakeCache, clock: Clock) -> None:
    """There is room for all that lives, so nothing of it is evicted: not even where it was used last of all."""
    keep, live = 500, 1800 * RATE // 4
    cache = make_cache(max_bytes="64MB", max_entries=(keep + live) * 3 // 2, shards=1, clock=clock)
    for number in range(keep):
        cache.set(("keep", number), 0)
    for number in range(live * 3):
        clock.advance(4 / RATE)
        cache.set(number, 0, ttl=1800)
    assert cache.stats().evictions == 0
    assert all(("keep", number) in cache for number in range(keep))


@pytest.mark.parametrize("idle", [1, 40, 2_000, 100_000, 31_536_000, 1_000_000_000])
def test_after_any_idle_time(make_cache: MakeCache, clock: Clock, idle: int) -> None:
    """The first writes after a long time without any find the expired entries, and no others."""
    cache = make_cache(max_bytes="1MB", max_entries=256, shards=1, clock=clock)
    for number in range(200):
        cache.set(number, 0, ttl=2.0 ** (number % 32))
    alive = sum(2.0 ** (number % 32) > idle for number in range(200))
    clock.advance(idle)
    for number in range(256 - alive):
        cache.set(("new", number), 0)
    assert cache.stats().evictions == 0
    assert sum(number in cache for number in range(200)) == alive


def test_a_writer_whose_clock_was_read_a_moment_ago_changes_nothing(make_cache: MakeCache, clock: Clock) -> None:
    """It read the time, waited for the lock across the end of a tick, and finds the hand of the wheel ahead of it."""
    cache = make_cache(max_bytes="1MB", shards=1, clock=clock)
    late = make_cache(cache.name, clock=lambda: clock.now - 1_000_000)
    clock.now = (clock.now >> layout.WHEEL_SHIFT << layout.WHEEL_SHIFT) + 500_000
    cache.set("a", 1, ttl=1000)
    hand = cache._attachment.geometry.region(0).header + layout.S_HAND
    before = load(cache._attachment.words, hand)
    late.set("b", 1, ttl=1000)
    late.set("c", 1, ttl=0.0001)
    assert load(cache._attachment.words, hand) == before == clock.now >> layout.WHEEL_SHIFT
    clock.advance(2)
    assert cache.purge() == 1
    assert set(cache) == {"a", "b"}


def test_purge_removes_all_that_has_expired_and_nothing_else(make_cache: MakeCache, clock: Clock) -> None:
    cache = make_cache(max_bytes="4MB", max_entries=5000, shards=1, clock=clock)
    for number in range(4000):
        clock.advance(0.37)
        cache.set(number, 0, ttl=1 + number * 7919 % 5000)
    for span in (0.1, 3, 50, 700, 4000):
        clock.advance(span)
        gone = sum(clock.now >= expiry for expiry in expiries(cache))
        assert cache.purge() == gone
        assert all(clock.now < expiry for expiry in expiries(cache))


def expiries(cache: Cache) -> list[int]:
    """When the entries expire, ns, those included that have and are still there."""
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    slots = range(region.slots, region.slots + cache._attachment.geometry.slots * layout.SLOT_WORDS, layout.SLOT_WORDS)
    return [
        load(words, slot + layout.E_EXPIRY) for slot in slots if load(words, slot + layout.E_PLACE) & 0xFFFF_FFFF != 0
    ]
