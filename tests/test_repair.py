"""`check()` finds whatever is wrong in the segment, and `repair()` keeps what can be proved."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from shmcache import Cache, ShmcacheError, is_compiled
from shmcache.engine import layout, repair, table
from shmcache.engine.primitives import load, pack, store
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


# --- each thing that `check` looks at -------------------------------------------------------------------------------
FREE_AT, FREE = 6, 427  # where the free run of the small cache begins, and its length


class Small:
    """`a`, `b` and `c` are in slots and blocks 0, 1 and 2, `d` is in slot 3 and blocks 3 to 5; `b` and `d` expire."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self.cache = cache
        self.words = cache.attachment.words
        self.region = cache.attachment.geometry.region(0)
        for key, value, ttl in (("a", "x", None), ("b", "x", 60), ("c", "x", None), ("d", "x" * 150, 61)):
            cache.set(key, value, ttl)
        assert cache.attachment.geometry.blocks == FREE_AT + FREE
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
    small.write(small.slot(1, layout.E_EXPIRY), small.now + 1000 * 10**9)
    return []


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
