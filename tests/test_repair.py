"""`check()` finds whatever is wrong in the segment, and `repair()` keeps what can be proved."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from shmcache import Cache, ShmcacheError, is_compiled
from shmcache.engine import layout, repair, table
from shmcache.engine.primitives import key_hash, load, pack, store
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
    region = cache._attachment.geometry.region(0)
    parts = ["header", "log", "bins", "wheel", "buckets", "slots", "blocks", "end"]
    return range(getattr(region, part), getattr(region, parts[parts.index(part) + 1]))


@pytest.mark.parametrize("part", ["bins", "wheel", "buckets"])
def test_what_follows_from_the_slots_is_made_anew(cache: Cache, part: str) -> None:
    """Buckets, timer lists and bins full of nonsense cost no entry."""
    before = contents(cache)
    for word in words_of(cache, part):
        store(cache._attachment.words, word, 0xDEAD_BEEF_0000_0007)
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
    header = cache._attachment.geometry.region(0).header
    word = header + getattr(layout, field)
    store(cache._attachment.words, word, load(cache._attachment.words, word) ^ 0x0000_0003_0000_0003)
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
        if load(cache._attachment.words, at + layout.E_PLACE) & 0xFFFF_FFFF
    ]
    store(cache._attachment.words, used[7] + getattr(layout, field), 0x0000_7777_0055_5555)
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
    header = cache._attachment.geometry.region(0)
    words = cache._attachment.words
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
        region = cache._attachment.geometry.region(0)
        for _ in range(rng.choice([1, 10, 200])):
            word = rng.randrange(region.log, region.end)
            old = load(cache._attachment.words, word)
            store(cache._attachment.words, word, rng.choice([0, rng.getrandbits(64), old ^ 1 << rng.randrange(64)]))
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
    words = cache._attachment.words
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
    words = cache._attachment.words
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


# --- each thing that `check` looks at -------------------------------------------------------------------------------
FREE_AT, FREE = 6, 427  # where the free run of the small cache begins, and its length


class Small:
    """`a`, `b` and `c` are in slots and blocks 0, 1 and 2, `d` is in slot 3 and blocks 3 to 5; `b` and `d` expire."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self.cache = cache
        self.words = cache._attachment.words
        self.region = cache._attachment.geometry.region(0)
        for key, value, ttl in (("a", "x", None), ("b", "x", 60), ("c", "x", None), ("d", "x" * 150, 61)):
            cache.set(key, value, ttl)
        assert cache._attachment.geometry.blocks == FREE_AT + FREE
        self.now = clock()

    def header(self, field: int) -> int:
        return int(self.region.header) + field

    def slot(self, slot: int, field: int) -> int:
        return int(self.region.slots) + slot * layout.SLOT_WORDS + field

    def bucket(self, slot: int) -> int:
        """The number of the bucket that a slot belongs to."""
        return (self.read(self.slot(slot, layout.E_HASH)) & 0xFFFF_FFFF) * SLOTS >> 32

    def block(self, block: int, word: int = 0) -> int:
        return int(self.region.blocks) + block * layout.BLOCK_WORDS + word

    def bin(self, number: int) -> int:
        return int(self.region.bins) + layout.BIN_BITMAP_WORDS + number

    def read(self, index: int) -> int:
        return load(self.words, index)

    def write(self, index: int, value: int) -> None:
        store(self.words, index, value)

    def change(self, index: int, by: int) -> None:
        self.write(index, (self.read(index) + by) % (1 << 64))

    def free_bin(self) -> int:
        """The bin that the free run is in."""
        [number] = [number for number in range(layout.BINS) if self.read(self.bin(number))]
        return number


SLOTS = 8
LINK = 1 << 32  # of a word with two halves, 1 in the upper one


@pytest.fixture
def small(make_cache: Callable[..., Cache], clock: Clock) -> Iterator[Small]:
    small = Small(make_cache(max_bytes="48KB", max_entries=SLOTS, shards=1, clock=clock), clock)
    assert small.cache.check() == []
    yield small
    small.cache.repair()


Damage: TypeAlias = Callable[[Small], list[str]]
DAMAGES: dict[str, Damage] = {}


def damage(make: Damage) -> Damage:
    """One wrong thing in a small cache; what `check` has to say about it, and nothing else."""
    DAMAGES[make.__name__] = make
    return make


CONTRADICTS = "slot 1: its key, its sizes or its runs contradict each other"
UNCLAIMED = "block 1: its run is neither free nor an entry's"


@damage
def odd_version(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_VERSION), 1)
    return ["slot 1: its version is odd, though nobody is changing it"]


@damage
def odd_version_of_a_free_slot(small: Small) -> list[str]:
    small.change(small.slot(7, layout.E_VERSION), 1)
    return ["slot 7: its version is odd, though nobody is changing it"]


@damage
def version_beyond_the_last_that_was_given(small: Small) -> list[str]:
    small.write(small.slot(1, layout.E_VERSION), small.read(small.header(layout.S_STAMP)) + 2)
    return ["slot 1: its version has not been given to any slot yet"]


@damage
def last_version_that_is_odd(small: Small) -> list[str]:
    small.change(small.header(layout.S_STAMP), 1)
    return ["the header's last version is odd, or higher than versions get"]


@damage
def last_version_that_is_too_high(small: Small) -> list[str]:
    small.write(small.header(layout.S_STAMP), 1 << layout.STAMP_BITS)
    return ["the header's last version is odd, or higher than versions get"]


@damage
def kind_of_key_too_low(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_SIZES), -(1 << 48))
    return [CONTRADICTS, UNCLAIMED]


@damage
def kind_of_key_too_high(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_SIZES), 3 << 48)
    return [CONTRADICTS, UNCLAIMED]


@damage
def another_kind_of_key(small: Small) -> list[str]:
    """Not what was hashed."""
    small.change(small.slot(1, layout.E_SIZES), 2 << 48)
    return [CONTRADICTS, UNCLAIMED]


@damage
def other_key_bytes(small: Small) -> list[str]:
    small.change(small.block(1, 1), 1)
    return [CONTRADICTS, UNCLAIMED]


@damage
def value_longer_than_its_run(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_SIZES), 54)
    return [CONTRADICTS, UNCLAIMED, "the header counts 162 bytes of keys and values, the slots 216"]


@damage
def value_as_long_as_its_run(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_SIZES), 53)
    return ["the header counts 162 bytes of keys and values, the slots 215"]


@damage
def run_without_length(small: Small) -> list[str]:
    small.write(small.block(1), 0)
    return [CONTRADICTS, "block 1: the run that begins here has no length"]


@damage
def run_that_an_entry_has_and_is_free(small: Small) -> list[str]:
    small.change(small.block(1), layout.RUN_FREE << 32)
    return [
        CONTRADICTS,
        "block 1: its free run does not end with its beginning",
        "block 2: its run is wrong about whether the one before is free",
        f"{FREE + 1} blocks are free, the header has {FREE}",
    ]


@damage
def a_second_run_that_has_no_length(small: Small) -> list[str]:
    """Though with the third there would be room enough."""
    small.change(small.slot(1, layout.E_SIZES), 60 - 3)
    small.change(small.block(1), 7 + 1)
    small.write(small.block(7), 8 + 1)
    small.write(small.block(8), LINK)
    return [CONTRADICTS, UNCLAIMED, "the header counts 162 bytes of keys and values, the slots 219"]


@damage
def a_chain_that_ends_in_the_run_of_another(small: Small) -> list[str]:
    """All of its own runs are given up, and not that one."""
    small.change(small.slot(1, layout.E_SIZES), 200 - 3)
    small.change(small.block(1), 8 + 1)
    small.write(small.block(8), LINK | 0 + 1)
    return [CONTRADICTS, UNCLAIMED, "the header counts 162 bytes of keys and values, the slots 359"]


@damage
def other_key_bytes_before_the_run_of_another(small: Small) -> list[str]:
    """It has claimed both runs before its key is looked at; the other one's is free again for its owner."""
    small.change(small.slot(1, layout.E_SIZES), 60 - 3)
    small.change(small.block(1), 3 + 1)
    small.change(small.block(1, 1), 1)
    return [CONTRADICTS, UNCLAIMED, "the header counts 162 bytes of keys and values, the slots 219"]


@damage
def a_run_more_than_the_value_fills(small: Small) -> list[str]:
    """The first holds it to the last byte."""
    small.change(small.slot(1, layout.E_SIZES), 53)
    small.change(small.block(1), FREE_AT + 1)
    small.write(small.block(FREE_AT + 1 - 1), LINK)
    return [
        CONTRADICTS,
        UNCLAIMED,
        f"block {FREE_AT}: its run is neither free nor an entry's",
        f"block {FREE_AT + 1}: the run that begins here has no length",
        f"block {FREE_AT}: it is in bin {small.free_bin()} wrongly, or not linked back",
        "the header counts 162 bytes of keys and values, the slots 215",
    ]


@damage
def more_runs_than_the_value_takes(small: Small) -> list[str]:
    small.change(small.block(1), FREE_AT + 1)
    return [CONTRADICTS, UNCLAIMED]


@damage
def a_run_of_two_entries(small: Small) -> list[str]:
    """The second is the one that is wrong."""
    small.change(small.slot(2, layout.E_PLACE), -1)
    return [
        "slot 2: its key, its sizes or its runs contradict each other",
        "block 2: its run is neither free nor an entry's",
    ]


@damage
def a_run_into_the_next_one(small: Small) -> list[str]:
    """The first claims it; the second is the one that is wrong."""
    small.change(small.block(1), LINK)
    return ["slot 2: its key, its sizes or its runs contradict each other"]


@damage
def a_run_within_another(small: Small) -> list[str]:
    """The first claims it; the second, whose bytes it overwrote, is the one that is wrong."""
    small.change(small.slot(2, layout.E_PLACE), 2)
    small.write(small.block(4), LINK)
    small.write(small.block(4, 1), small.read(small.block(2, 1)))
    return [
        "slot 3: its key, its sizes or its runs contradict each other",
        "block 2: its run is neither free nor an entry's",
        "block 3: its run is neither free nor an entry's",
    ]


@damage
def a_run_from_within_another_into_a_free_one(small: Small) -> list[str]:
    """Blocks 5 and 6: the end of what is `d`'s, and the beginning of what is free."""
    small.write(small.slot(1, layout.E_PLACE), 5 + 1)
    small.write(small.block(5), 2 * LINK)
    small.write(small.block(5, 1), small.read(small.block(1, 1)))
    return [
        "slot 3: its key, its sizes or its runs contradict each other",
        UNCLAIMED,
        "block 3: its run is neither free nor an entry's",
        "block 6: its run is free, but an entry has it",
    ]


@damage
def bucket_that_is_empty(small: Small) -> list[str]:
    bucket = small.bucket(0)
    lost = sum(small.bucket(slot) == bucket for slot in range(4))
    small.write(small.region.buckets + bucket, 0)
    return [f"{4 - lost} slots are in chains, but 4 are used"]


@damage
def bucket_that_leads_outside(small: Small) -> list[str]:
    bucket = small.bucket(0)
    lost = sum(small.bucket(slot) == bucket for slot in range(4))
    small.write(small.region.buckets + bucket, SLOTS + 1)
    return [
        f"bucket {bucket}: its chain leads to slot {SLOTS}, outside the table or for a second time",
        f"{4 - lost} slots are in chains, but 4 are used",
    ]


@damage
def chain_that_is_a_circle(small: Small) -> list[str]:
    bucket = small.bucket(0)
    last = min(slot for slot in range(4) if small.bucket(slot) == bucket)
    head = small.read(small.region.buckets + bucket)
    small.write(small.slot(last, layout.E_CHAIN), head)
    slot = (head & 0xFFFF_FFFF) - 1
    return [f"bucket {bucket}: its chain leads to slot {slot}, outside the table or for a second time"]


@damage
def chain_to_a_free_slot(small: Small) -> list[str]:
    """Not taken for a free one in order: it is met for a second time among those."""
    bucket = small.bucket(0)
    last = min(slot for slot in range(4) if small.bucket(slot) == bucket)
    small.write(small.slot(last, layout.E_CHAIN), 8)
    return [
        f"bucket {bucket}: its chain leads to slot 7, which is free",
        "5 slots are in chains, but 4 are used",
        "the free slots lead to slot 7, outside the table, in use or for a second time",
    ]


@damage
def link_with_a_wrong_tag(small: Small) -> list[str]:
    bucket = small.bucket(0)
    head = small.region.buckets + bucket
    small.change(head, LINK)
    slot = (small.read(head) & 0xFFFF_FFFF) - 1
    return [f"bucket {bucket}: its chain leads to slot {slot} of another bucket or tag"]


@damage
def slots_in_a_bucket_of_others(small: Small) -> list[str]:
    bucket = small.bucket(0)
    slots, link = [], small.read(small.region.buckets + bucket)
    while link:
        slots.append((link & 0xFFFF_FFFF) - 1)
        link = small.read(small.slot(slots[-1], layout.E_CHAIN))
    other = next(number for number in range(SLOTS) if not small.read(small.region.buckets + number))
    small.write(small.region.buckets + other, small.read(small.region.buckets + bucket))
    small.write(small.region.buckets + bucket, 0)
    return [f"bucket {other}: its chain leads to slot {slot} of another bucket or tag" for slot in slots]


@damage
def free_slots_that_lead_outside(small: Small) -> list[str]:
    small.write(small.header(layout.S_FREE_SLOT), SLOTS + 1)
    return [f"the free slots lead to slot {SLOTS}, outside the table, in use or for a second time"]


@damage
def free_slots_that_lead_to_one_in_use(small: Small) -> list[str]:
    small.write(small.slot(7, layout.E_CHAIN), 2)
    return ["the free slots lead to slot 1, outside the table, in use or for a second time"]


@damage
def free_slots_in_a_circle(small: Small) -> list[str]:
    small.write(small.slot(7, layout.E_CHAIN), 5)
    return ["the free slots lead to slot 4, outside the table, in use or for a second time"]


@damage
def free_slots_that_lack_one(small: Small) -> list[str]:
    small.write(small.header(layout.S_FREE_SLOT), 6)
    return ["3 slots are free and 4 used, of 8"]


@damage
def slot_in_use_among_the_free_ones(small: Small) -> list[str]:
    """It is in no chain, either."""
    small.write(small.slot(4, layout.E_PLACE), FREE_AT + 1)
    return [
        "slot 4: its key, its sizes or its runs contradict each other",
        "4 slots are in chains, but 5 are used",
        "slot 4 is in use and among the free ones",
        "4 slots are free and 5 used, of 8",
        "the eviction list has 4 slots and ends at 1, expected 5 and 1",
        "the header counts 4 entries, the slots 5",
    ]


@damage
def order_that_leads_outside(small: Small) -> list[str]:
    small.change(small.header(layout.S_ORDER), SLOTS + 1 - 4)
    return [f"the eviction list leads to slot {SLOTS}, outside the table or in a circle"]


@damage
def order_that_is_empty(small: Small) -> list[str]:
    small.write(small.header(layout.S_ORDER), 0)
    return ["the eviction list has 0 slots and ends at 0, expected 4 and 0"]


@damage
def order_with_a_wrong_end(small: Small) -> list[str]:
    small.change(small.header(layout.S_ORDER), LINK)
    return ["the eviction list has 4 slots and ends at 1, expected 4 and 2"]


@damage
def order_that_leaves_one_out(small: Small) -> list[str]:
    small.write(small.slot(1, layout.E_ORDER), 3)
    small.write(small.header(layout.S_ORDER), 4 | 2 << 32)
    return ["the eviction list has 3 slots and ends at 2, expected 4 and 2"]


@damage
def order_that_is_not_linked_back(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_ORDER), 1)
    return ["slot 1: its place in the eviction list is not linked back, or it is free"]


@damage
def order_with_a_free_slot(small: Small) -> list[str]:
    small.write(small.slot(0, layout.E_ORDER), 8 << 32 | 2)
    small.write(small.slot(7, layout.E_ORDER), 1)
    return ["slot 7: its place in the eviction list is not linked back, or it is free"]


@damage
def timers_that_lead_outside(small: Small) -> list[str]:
    small.write(small.region.wheel + 5, SLOTS + 1)
    return [f"timer list 5 leads to slot {SLOTS}, outside the table or in a circle"]


@damage
def timer_of_an_entry_without_expiry(small: Small) -> list[str]:
    small.write(small.region.wheel + 5, 1)
    small.write(small.slot(0, layout.E_TIMER), layout.WHEEL_FIRST | 5)
    return ["slot 0: it is in timer list 5 wrongly, or not linked back"]


@damage
def timer_of_an_entry_without_expiry_behind_all_others(small: Small) -> list[str]:
    small.write(small.region.wheel + 60, 1)
    small.write(small.slot(0, layout.E_TIMER), layout.WHEEL_FIRST | 60)
    return ["slot 0: it is in timer list 60 wrongly, or not linked back"]


@damage
def timer_that_is_not_linked_back(small: Small) -> list[str]:
    small.change(small.slot(1, layout.E_TIMER), 1)
    return ["slot 1: it is in timer list 49 wrongly, or not linked back"]


@damage
def timers_that_lack_one(small: Small) -> list[str]:
    small.write(small.slot(3, layout.E_TIMER), layout.WHEEL_FIRST | 49)
    return ["the timer wheel has 1 slots, but 2 have an expiry"]


@damage
def expiry_before_its_list_comes_up(small: Small) -> list[str]:
    small.write(small.slot(1, layout.E_EXPIRY), small.now + 10 * 10**9)
    return ["slot 1: it is in timer list 49 wrongly, or not linked back"]


@damage
def expiry_after_its_list_comes_up(small: Small) -> list[str]:
    """It is looked at too early, and dealt out again."""
    small.write(small.slot(1, layout.E_EXPIRY), small.now + 200 * 10**9)
    return []


@damage
def hand_before_a_list_that_is_not_dealt_out_yet(small: Small) -> list[str]:
    """As it stands between two looks at the list: it has come up, and its entries would go elsewhere now."""
    tick = small.read(small.slot(1, layout.E_EXPIRY)) >> layout.WHEEL_SHIFT
    small.write(small.header(layout.S_HAND), tick >> layout.WHEEL_BITS << layout.WHEEL_BITS)
    return []


@damage
def hand_beyond_a_list(small: Small) -> list[str]:
    tick = small.read(small.slot(1, layout.E_EXPIRY)) >> layout.WHEEL_SHIFT
    small.write(
        small.header(layout.S_HAND), (tick >> layout.WHEEL_BITS << layout.WHEEL_BITS) + (1 << layout.WHEEL_BITS)
    )
    return ["slot 3: it is in timer list 49 wrongly, or not linked back"]


@damage
def run_that_is_wrong_about_the_one_before(small: Small) -> list[str]:
    small.change(small.block(1), layout.RUN_AFTER_FREE << 32)
    return ["block 1: its run is wrong about whether the one before is free"]


@damage
def two_free_runs_side_by_side(small: Small) -> list[str]:
    """Both in their bins, and linked rightly, but they should be one."""
    other, number = FREE_AT + FREE - 2, 2
    small.change(small.block(FREE_AT), -2 * LINK)
    small.write(small.block(other - 1, 7), FREE_AT)
    small.write(small.block(other), (2 | layout.RUN_FREE | layout.RUN_AFTER_FREE) << 32)
    small.write(small.block(other, 1), 0)
    small.write(small.block(other + 1, 7), other)
    small.write(small.bin(number), other + 1)
    small.change(small.region.bins, 1 << number)
    return [f"block {other}: its free run should be one with the one before"]


@damage
def free_run_without_its_end(small: Small) -> list[str]:
    small.change(small.block(FREE_AT + FREE - 1, 7), 1)
    return [f"block {FREE_AT}: its free run does not end with its beginning"]


@damage
def free_run_that_nobody_has(small: Small) -> list[str]:
    small.change(small.block(FREE_AT), -(layout.RUN_FREE << 32))
    return [
        f"block {FREE_AT}: its run is neither free nor an entry's",
        f"0 blocks are free, the header has {FREE}",
        f"block {FREE_AT}: it is in bin {small.free_bin()} wrongly, or not linked back",
    ]


@damage
def wrong_number_of_free_blocks(small: Small) -> list[str]:
    small.change(small.header(layout.S_FREE_BLOCKS), 1)
    return [
        f"{FREE} blocks are free, the header has {FREE + 1}",
        f"{FREE} blocks in bins, the header has {FREE + 1}",
    ]


@damage
def bit_of_an_empty_bin(small: Small) -> list[str]:
    small.change(small.region.bins + 1, 1 << 3)
    return ["bin 67: its bit does not tell whether it has a run"]


@damage
def bit_of_the_first_empty_bin_of_the_second_word(small: Small) -> list[str]:
    small.change(small.region.bins + 1, 1)
    return ["bin 64: its bit does not tell whether it has a run"]


@damage
def bin_without_its_bit(small: Small) -> list[str]:
    number = small.free_bin()
    small.change(small.region.bins + number // 64, -(1 << number % 64))
    return [f"bin {number}: its bit does not tell whether it has a run"]


@damage
def bin_that_leads_outside(small: Small) -> list[str]:
    small.write(small.bin(small.free_bin()), FREE_AT + FREE + 1)
    return [f"bin {small.free_bin()} leads to block {FREE_AT + FREE}, outside the blocks or in a circle"]


@damage
def bin_of_another_length(small: Small) -> list[str]:
    small.write(small.bin(small.free_bin()), 0)
    small.write(small.region.bins, 1 << 20)
    small.write(small.bin(20), FREE_AT + 1)
    return [f"block {FREE_AT}: it is in bin 20 wrongly, or not linked back"]


@damage
def bin_that_is_not_linked_back(small: Small) -> list[str]:
    small.change(small.block(FREE_AT, 1), 1)
    return [f"block {FREE_AT}: it is in bin {small.free_bin()} wrongly, or not linked back"]


@damage
def bin_that_is_a_circle(small: Small) -> list[str]:
    small.write(small.block(FREE_AT, 1), pack(FREE_AT + 1, 0))
    return [f"block {FREE_AT}: it is in bin {small.free_bin()} wrongly, or not linked back"]


@damage
def bin_that_is_empty(small: Small) -> list[str]:
    number = small.free_bin()
    small.write(small.bin(number), 0)
    small.change(small.region.bins + number // 64, -(1 << number % 64))
    return [f"0 blocks in bins, the header has {FREE}"]


@damage
def wrong_number_of_entries(small: Small) -> list[str]:
    small.change(small.header(layout.S_ENTRIES), 1)
    return ["the header counts 5 entries, the slots 4"]


@damage
def wrong_number_of_bytes(small: Small) -> list[str]:
    small.change(small.header(layout.S_USED_BYTES), -1)
    return ["the header counts 161 bytes of keys and values, the slots 162"]


@pytest.mark.parametrize("make", DAMAGES.values(), ids=DAMAGES)
def test_check_says_what_is_wrong_and_repair_mends_it(small: Small, make: Damage) -> None:
    expected = make(small)
    assert small.cache.check() == [f"shard 0: {problem}" for problem in expected]
    used = sum(small.read(small.slot(slot, layout.E_PLACE)) & 0xFFFF_FFFF != 0 for slot in range(SLOTS))
    dropped = small.cache.repair()
    assert small.cache.check() == []
    assert len(dropped) == used - len(small.cache)
    assert small.cache.repair() == []


def test_a_kind_of_key_that_is_none_is_wrong_whatever_its_hash(small: Small) -> None:
    sizes = small.read(small.slot(1, layout.E_SIZES))
    for kind in (0, layout.KEY_PACKED + 1):
        small.write(small.slot(1, layout.E_SIZES), sizes & 0xFFFF_FFFF_FFFF | kind << 48)
        small.write(small.slot(1, layout.E_HASH), key_hash(b"b", 1, kind, *small.cache._attachment.secret))
        assert f"shard 0: {CONTRADICTS}" in small.cache.check()


def test_an_entry_in_pieces_up_to_the_last_block_is_sound(small: Small) -> None:
    fill = (FREE - 1) * layout.BLOCK_BYTES - layout.RUN_HEADER_BYTES - 4
    small.cache.set("e", "x" * fill)
    small.cache.delete("b")
    small.cache.set("f", "y" * 90)
    assert small.read(small.header(layout.S_FREE_BLOCKS)) == 0
    assert small.cache.check() == []
    expected = {"a": "x", "c": "x", "d": "x" * 150, "e": "x" * fill, "f": "y" * 90}
    assert contents(small.cache) == expected
    for _ in range(2):
        assert small.cache.repair() == []
        assert small.cache.check() == []
        assert contents(small.cache) == expected
    small.cache.delete("f")  # a free run in the last block of all
    assert small.cache.check() == []


def test_a_full_table_of_entries_that_expire_is_sound(small: Small) -> None:
    for key in "abcdefgh":
        small.cache.set(key, "x", 60)
    assert small.cache.check() == []
    assert small.cache.repair() == []


def test_no_more_than_a_hundred_problems_are_told(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes="64KB", max_entries=120, shards=1)
    region = cache._attachment.geometry.region(0)
    for slot in range(120):
        store(cache._attachment.words, region.slots + slot * layout.SLOT_WORDS, 1)
    assert len(cache.check()) == 100
    cache.repair()


def test_repair_of_one_shard_touches_no_other(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes="128KB", max_entries=8, shards=2)
    for number in range(8):
        cache.set(number, "x" * 3000)
    geometry = cache._attachment.geometry
    before = bytes(cache._attachment.data[geometry.region(1).header * 8 : geometry.region(1).end * 8])
    header = bytes(cache._attachment.data[: layout.HEADER_WORDS * 8])
    cache._inspect(cache._attachment.shards[:1], True)
    after = bytes(cache._attachment.data[geometry.region(1).header * 8 : geometry.region(1).end * 8])
    assert after == before
    assert bytes(cache._attachment.data[: layout.HEADER_WORDS * 8]) == header


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(small: Small, enabled: bool) -> None:
    """It does not run while the lock is held: a finalizer that it calls may want the lock."""
    try:
        if not enabled:
            gc.disable()
        small.cache.check()
        assert gc.isenabled() is enabled
        small.cache.repair()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


# --- each thing that `repair` does ----------------------------------------------------------------------------------
def test_the_words_of_a_recovery_are_cleared(small: Small) -> None:
    """A rebuild that died left them; the next owner of the lock begins it again."""
    for field in (layout.S_SUBJECT, layout.S_LIMBO):
        small.write(small.header(field), 2)
    small.write(small.header(layout.S_STATE), layout.STATE_REPAIRING)
    small.write(small.region.log, 5)
    sequence = small.read(small.header(layout.S_SEQUENCE))
    assert small.cache.delete("nothing") is False
    for field in (layout.S_SUBJECT, layout.S_LIMBO, layout.S_STATE):
        assert small.read(small.header(field)) == 0
    assert small.read(small.region.log) == 0
    assert small.read(small.header(layout.S_SEQUENCE)) == (sequence | 1) + 1
    assert small.cache.check() == []
    assert len(small.cache) == 4


@pytest.mark.parametrize("sequence", [40, 41, 43, 44])
def test_the_sequence_moves_forward_and_is_even_again(small: Small, sequence: int) -> None:
    small.write(small.header(layout.S_STATE), layout.STATE_REPAIRING)
    small.write(small.header(layout.S_SEQUENCE), sequence)
    small.cache.delete("nothing")
    assert small.read(small.header(layout.S_SEQUENCE)) == (sequence | 1) + 1


@pytest.mark.parametrize(
    ("stamp", "version", "comes_to", "version_then"),
    [
        (100, 98, 100, 98),
        (100, 100, 100, 100),
        (100, 99, 102, 102),  # odd: somebody died while he changed it
        (100, 104, 106, 104),  # versions must not come again
        (100, 107, 110, 110),
        (101, 98, 100, 98),  # a stamp that is odd follows the highest version
        (101, 104, 106, 104),
        (100, 1 << 62, 102, 102),  # a version that nothing leads to is given another
        (100, (1 << 62) + 4, 102, 102),
        (100, (1 << 64) - 2, 102, 102),
    ],
)
def test_versions_move_forward(small: Small, stamp: int, version: int, comes_to: int, version_then: int) -> None:
    for slot in range(SLOTS):
        small.write(small.slot(slot, layout.E_VERSION), 98)
    small.write(small.slot(2, layout.E_VERSION), version)
    small.write(small.header(layout.S_STAMP), stamp)
    assert small.cache.repair() == []
    assert small.read(small.header(layout.S_STAMP)) == comes_to
    assert small.read(small.slot(2, layout.E_VERSION)) == version_then
    assert small.read(small.slot(1, layout.E_VERSION)) == 98
    assert small.cache.gets("c") == ("x", version_then)


def test_a_second_slot_of_the_same_key_is_dropped(small: Small) -> None:
    """With a run of its own, so that only the key tells; nothing of the first is touched."""
    for field in (layout.E_HASH, layout.E_SIZES):
        small.write(small.slot(4, field), small.read(small.slot(1, field)))
    small.write(small.slot(4, layout.E_PLACE), 8 + 1)
    small.write(small.block(8), LINK)
    small.write(small.block(8, 1), small.read(small.block(1, 1)))
    assert small.cache.repair() == ["shard 0: slot 4 was dropped: another slot has the same key"]
    assert small.cache.check() == []
    assert sorted(small.cache) == ["a", "b", "c", "d"]
    assert small.read(small.header(layout.S_FREE_BLOCKS)) == FREE


def test_of_several_keys_in_one_bucket_none_is_taken_for_another(make_cache: Callable[..., Cache]) -> None:
    """And a second slot of any of them is found, wherever it is in the chain."""
    for place in range(3):
        cache = make_cache(max_bytes="48KB", max_entries=4, shards=1)
        words, region = cache._attachment.words, cache._attachment.geometry.region(0)
        key_of: dict[int, list[str]] = {}
        for number in range(100):
            hash = key_hash(str(number).encode(), len(str(number)), layout.KEY_TEXT, *cache._attachment.secret)
            key_of.setdefault((hash & 0xFFFF_FFFF) * 4 >> 32, []).append(str(number))
        keys = next(keys for keys in key_of.values() if len(keys) >= 3)[:3]
        for key in keys:
            cache.set(key, "x")
        assert cache.repair() == []
        assert sorted(cache) == sorted(keys)
        slots = [region.slots + slot * layout.SLOT_WORDS for slot in range(4)]
        for field in (layout.E_HASH, layout.E_SIZES):
            store(words, slots[3] + field, load(words, slots[place] + field))
        store(words, slots[3] + layout.E_PLACE, 9)
        for word in range(2):
            old = region.blocks + place * layout.BLOCK_WORDS + word
            store(words, region.blocks + 8 * layout.BLOCK_WORDS + word, load(words, old))
        assert cache.repair() == ["shard 0: slot 3 was dropped: another slot has the same key"]
        assert sorted(cache) == sorted(keys)


@pytest.mark.skipif(is_compiled(), reason="reaches into the sources")
def test_a_twin_is_looked_for_to_the_end_of_the_chain_and_not_for_ever(small: Small) -> None:
    inspector = repair.Inspector(small.cache._attachment.shards[0])
    for slot in range(SLOTS):
        small.write(small.slot(slot, layout.E_HASH), 5)
        small.write(small.slot(slot, layout.E_SIZES), pack(slot % 7, 1))
        small.write(small.slot(slot, layout.E_CHAIN), slot)
    small.write(small.region.buckets, SLOTS - 1)
    assert inspector.has_twin(7)  # slot 0 is its twin, and the last of seven in the chain
    small.write(small.slot(0, layout.E_SIZES), pack(50, 1))
    assert not inspector.has_twin(7)
    small.write(small.slot(0, layout.E_CHAIN), SLOTS - 1)
    assert not inspector.has_twin(7)


def test_the_order_is_that_of_the_ticks_which_wrap(small: Small) -> None:
    small.write(small.header(layout.S_TICK), 3)
    for slot, tick in enumerate((0xFFFF_FFFE, 1, 0xFFFF_FFFF, 2)):
        place = small.read(small.slot(slot, layout.E_PLACE))
        small.write(small.slot(slot, layout.E_PLACE), pack(tick, place & 0xFFFF_FFFF))
    assert small.cache.repair() == []
    found, slot = [], small.read(small.header(layout.S_ORDER)) & 0xFFFF_FFFF
    while slot:
        found.append(slot - 1)
        slot = small.read(small.slot(slot - 1, layout.E_ORDER)) >> 32
    assert found == [3, 1, 2, 0]  # the most recently used first


@pytest.mark.parametrize(("hand", "comes_to"), [(0, 500), (1, 1), (499, 499), (500, 500), (501, 500), (10**9, 500)])
def test_the_hand_is_where_it_was_but_before_all_that_expires(small: Small, hand: int, comes_to: int) -> None:
    small.write(small.header(layout.S_HAND), hand)
    small.write(small.slot(1, layout.E_EXPIRY), 500 << layout.WHEEL_SHIFT | 7)
    small.write(small.slot(3, layout.E_EXPIRY), 600 << layout.WHEEL_SHIFT)
    small.write(small.slot(4, layout.E_EXPIRY), 1 << layout.WHEEL_SHIFT)  # a free slot: what was there counts no more
    assert small.cache.repair() == []
    assert small.read(small.header(layout.S_HAND)) == comes_to


@pytest.mark.parametrize("hand", [0, 1 << 40])
def test_the_hand_of_a_wheel_that_nothing_is_in_is_no_later_than_now(small: Small, hand: int) -> None:
    for key in "bd":
        small.cache.touch(key, None)
    small.write(small.header(layout.S_HAND), hand)
    assert small.cache.repair() == []
    assert small.read(small.header(layout.S_HAND)) == small.now >> layout.WHEEL_SHIFT


@pytest.mark.skipif(is_compiled(), reason="steps through the sources")
def test_readers_and_owners_to_come_know_of_a_rebuild_from_the_first_store_to_the_last(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a dropped slot held is gone before its version is even again."""
    stores: list[tuple[int, int]] = []
    known: list[bool] = []
    sequence, stamp = small.header(layout.S_SEQUENCE), small.read(small.header(layout.S_STAMP))

    def watched(words: memoryview, index: int, value: int) -> None:
        stores.append((index, value))
        known.append(load(words, sequence) & 1 == 1 and load(words, small.header(layout.S_STATE)) == 2)
        store(words, index, value)

    for name in ("store", "store_release"):
        monkeypatch.setattr(repair, name, watched)
    small.change(small.slot(1, layout.E_HASH), 1)
    place = small.read(small.slot(1, layout.E_PLACE))
    before = small.read(sequence)
    assert small.cache.repair() == [
        "shard 0: slot 1 was dropped: its key, its sizes or its runs contradicted each other"
    ]
    assert stores[:2] == [(sequence, before | 1), (small.header(layout.S_STATE), layout.STATE_REPAIRING)]
    assert stores[-2:] == [(small.header(layout.S_STATE), layout.STATE_READY), (sequence, (before | 1) + 1)]
    assert all(known[2:-1])
    assert {value for index, value in stores if index == small.region.log} == {0}
    dropping = [(small.slot(1, layout.E_VERSION), stamp + 1), (small.slot(1, layout.E_PLACE), place >> 32 << 32)]
    at = stores.index(dropping[0])
    assert stores[at - 1 : at + 3] == [
        (small.header(layout.S_STAMP), stamp + 2),
        *dropping,
        (small.slot(1, layout.E_VERSION), stamp + 2),
    ]
