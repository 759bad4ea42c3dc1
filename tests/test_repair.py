"""`check()` finds whatever is wrong in the segment, and `repair()` keeps what can be proved."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from shmcache import Cache, ShmcacheError, is_compiled
from shmcache.engine import layout, repair, table
from shmcache.engine.primitives import load, store
from tests.conftest import Clock

ENTRIES = 60


@pytest.fixture
def cache(make_cache: Callable[..., Cache], clock: Clock) -> Cache:
    """A cache of one shard with entries of several sizes, some with an expiry, some removed again."""
    cache = make_cache(max_bytes="256KB", max_entries=100, shards=1, clock=clock)
    for number in range(ENTRIES + 20):
        cache.set(f"key{number}", f"{number}:" * (number * 5 + 1), ttl=None if number % 3 else 100)
    cache.delete_many([f"key{number}" for number in range(0, 40, 2)])
    assert cache.check() == []
    return cache


def contents(cache: Cache) -> dict[object, object]:
    return dict(cache.items())


def words_of(cache: Cache, part: str) -> range:
    """The word indexes of a part of the shard."""
    region = cache.attachment.geometry.region(0)
    parts = ["header", "log", "bins", "wheel", "buckets", "slots", "blocks", "end"]
    return range(getattr(region, part), getattr(region, parts[parts.index(part) + 1]))


@pytest.mark.parametrize("part", ["bins", "wheel", "buckets"])
def test_what_follows_from_the_slots_is_made_anew(cache: Cache, part: str) -> None:
    """Buckets, timer lists and bins full of nonsense cost no entry."""
    before = contents(cache)
    for word in words_of(cache, part):
        store(cache.attachment.words, word, 0xDEAD_BEEF_0000_0007)
    assert cache.check() != []
    assert cache.repair() == []
    assert cache.check() == []
    assert contents(cache) == before
    for key, value in before.items():
        assert cache.get(key) == value


@pytest.mark.parametrize(
    "field",
    ["S_ORDER", "S_FREE_SLOT", "S_ENTRIES", "S_FREE_BLOCKS", "S_USED_BYTES"],
)
def test_each_head_in_the_header_is_made_anew(cache: Cache, field: str) -> None:
    """A wrong head, or a wrong count, is found and costs no entry."""
    before = contents(cache)
    header = cache.attachment.geometry.region(0).header
    word = header + getattr(layout, field)
    store(cache.attachment.words, word, load(cache.attachment.words, word) ^ 0x0000_0003_0000_0003)
    assert cache.check() != []
    assert cache.repair() == []
    assert contents(cache) == before


@pytest.mark.parametrize("field", ["E_HASH", "E_SIZES", "E_PLACE", "E_ORDER", "E_CHAIN"])
def test_a_broken_slot_costs_that_entry_at_most(cache: Cache, field: str) -> None:
    """One slot with a word of nonsense: all other entries stay."""
    before = contents(cache)
    used = [
        at
        for at in words_of(cache, "slots")[:: layout.SLOT_WORDS]
        if load(cache.attachment.words, at + layout.E_PLACE) & 0xFFFF_FFFF
    ]
    store(cache.attachment.words, used[7] + getattr(layout, field), 0x0000_7777_0055_5555)
    assert cache.check() != []
    assert len(cache.repair()) <= 1
    assert cache.check() == []
    after = contents(cache)
    assert len(after) >= len(before) - 1
    assert after.items() <= before.items()


def test_the_order_of_eviction_survives_repair(make_cache: Callable[..., Cache]) -> None:
    """Entries are evicted in the order of their last use, as before."""
    cache = make_cache(max_bytes="128KB", max_entries=10, shards=1)
    for number in range(10):
        cache.set(number, number)
    for number in (3, 0, 7):
        cache.get(number)
    assert cache.repair() == []
    for number in range(7):
        cache.set(f"new{number}", number)
    assert sorted(key for key in cache if isinstance(key, int)) == [0, 3, 7]


def test_what_recovery_needs_is_checked_at_the_next_operation(cache: Cache) -> None:
    """A log, a subject and a limbo chain that make no sense do not stop anybody."""
    header = cache.attachment.geometry.region(0)
    words = cache.attachment.words
    store(words, header.log, 5)
    for entry in range(5):
        store(words, header.log + layout.L_ENTRIES + 2 * entry, 1 << 60)
    store(words, header.header + layout.S_SUBJECT, 1 << 50)
    cache.set("after", 1)
    assert cache.get("after") == 1
    assert cache.check() == []


def test_random_damage_never_does_worse_than_lose_entries(make_cache: Callable[..., Cache], clock: Clock) -> None:
    """Any words of the shard overwritten: operations return or raise a ShmcacheError, and repair makes all well."""
    rng = random.Random(20)
    for _round in range(30):
        cache = make_cache(max_bytes="128KB", max_entries=40, shards=1, clock=clock)
        for number in range(60):
            cache.set(f"key{number}", f"{number}:" * rng.randrange(1, 300), ttl=rng.choice([None, 50]))
        region = cache.attachment.geometry.region(0)
        for _ in range(rng.choice([1, 10, 200])):
            word = rng.randrange(region.log, region.end)
            old = load(cache.attachment.words, word)
            store(cache.attachment.words, word, rng.choice([0, rng.getrandbits(64), old ^ 1 << rng.randrange(64)]))
        for number in range(60):
            with contextlib.suppress(ShmcacheError):
                cache.get(f"key{number}")
            with contextlib.suppress(ShmcacheError):
                cache.delete(f"key{number}")
            with contextlib.suppress(ShmcacheError):
                cache.set(f"key{number}", "x" * 500)
        cache.repair()
        assert cache.check() == []
        cache.clear()
        cache.set("whole", "again")
        assert cache.get("whole") == "again"


def test_two_slots_with_one_run_cost_one_of_them(cache: Cache) -> None:
    """The entry that keeps the run stays whole; its blocks are not given to anybody else."""
    words = cache.attachment.words
    slots = list(words_of(cache, "slots")[:: layout.SLOT_WORDS])
    used = [at for at in slots if load(words, at + layout.E_PLACE) & 0xFFFF_FFFF]
    free = [at for at in slots if not load(words, at + layout.E_PLACE) & 0xFFFF_FFFF]
    for field in (layout.E_HASH, layout.E_SIZES, layout.E_PLACE):
        store(words, free[0] + field, load(words, used[5] + field))
    before = contents(cache)
    assert cache.check() != []
    assert len(cache.repair()) == 1
    assert cache.check() == []
    assert contents(cache) == before
    for number in range(20):
        cache.set(f"new{number}", "x" * 100)
    assert {key: value for key, value in contents(cache).items() if key in before} == before


@pytest.mark.skipif(is_compiled(), reason="steps a reader through the sources")
@pytest.mark.parametrize("how", ["clear", "drop"])
def test_a_slot_being_emptied_lets_no_reader_begin(
    make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """From the moment a slot has its new version on, no reader can take what it led to for the value."""
    cache = make_cache(max_bytes="2MB", max_entries=64, shards=1)
    cache.set("key", "value")
    words = cache.attachment.words
    [at] = [at for at in words_of(cache, "slots")[:: layout.SLOT_WORDS] if load(words, at + layout.E_PLACE)]
    module = table if how == "clear" else repair
    begun_on_even = []

    def watched(view: memoryview, index: int, value: int) -> None:
        if index == at + layout.E_PLACE and not value & 0xFFFF_FFFF and load(view, index) & 0xFFFF_FFFF:
            begun_on_even.append(load(view, at + layout.E_VERSION) % 2 == 0)
        store(view, index, value)

    monkeypatch.setattr(module, "store", watched)
    if how == "drop":
        store(words, at + layout.E_HASH, 1)
        cache.repair()
    else:
        cache.clear()
    monkeypatch.undo()
    assert begun_on_even == [False]
    assert "key" not in cache
