"""What an operation does where the segment holds nonsense, or where something is taken from it half way.

Nothing here can happen to a cache that only this package writes to. Each test is about one place in the engine that
does not trust what it reads; on the sources, where that place can be reached by itself.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import runpy
import threading
from collections.abc import Callable, Iterator
from copy import copy as copy_object
from types import SimpleNamespace
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest

from shmcache import (
    Cache,
    CacheClosed,
    CorruptSegment,
    LockTimeout,
    SerializationError,
    ValueTooLarge,
    engine,
    is_compiled,
    stats,
)
from shmcache.engine import bytelock, layout, membership, primitives, reader, shard
from shmcache.engine.blocks import Blocks
from shmcache.engine.layout import BLOCK_BYTES, BLOCK_WORDS, RUN_HEADER_BYTES
from shmcache.engine.primitives import (
    copy,
    copy_in,
    key_hash,
    load,
    logged_store,
    low,
    pack,
    process_epoch,
    store,
    write_number,
)
from shmcache.engine.request import Request, _below_4_gib
from shmcache.engine.store import ADRIFT, CLOSED, DEFAULT
from tests.conftest import Clock
from tests.processes import Child, Gate, until

pytestmark = pytest.mark.skipif(is_compiled(), reason="reaches into the sources")

SLOTS = 8
NOWHERE = 0xFFFF_FFF0  # a block that there is not


class Bench:
    """A shard of eight slots with the entries `a` in slot and block 0, and `b` in slot and block 1, which expires."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self.cache = cache
        self.clock = clock
        self.words = cache._attachment.words
        self.region = cache._attachment.geometry.region(0)
        self.shard: Any = cache._attachment.shards[0]
        self.blocks: Any = self.shard.blocks
        self.count = cache._attachment.geometry.blocks
        cache.set("a", "value of a")
        cache.set("b", "value of b", 60)

    def header(self, field: int, value: int) -> None:
        store(self.words, self.region.header + field, value)

    def slot(self, slot: int, field: int, value: int) -> None:
        store(self.words, self.region.slots + slot * layout.SLOT_WORDS + field, value)

    def read_slot(self, slot: int, field: int) -> int:
        return load(self.words, self.region.slots + slot * layout.SLOT_WORDS + field)

    def block(self, block: int, value: int, word: int = 0) -> None:
        store(self.words, self.region.blocks + block * BLOCK_WORDS + word, value)


@pytest.fixture
def bench(make_cache: Callable[..., Cache], clock: Clock) -> Iterator[Bench]:
    bench = Bench(make_cache(max_bytes="48KB", max_entries=SLOTS, shards=1, clock=clock), clock)
    yield bench
    bench.cache.repair()


# --- blocks ---------------------------------------------------------------------------------------------------------
def test_a_key_may_be_in_pieces(bench: Bench) -> None:
    """Free memory is a block here and there, so that key and value begin a new run in their midst."""
    keys = [f"{number}" for number in range(4)]
    room = (bench.count - 2 - 4) * BLOCK_BYTES - RUN_HEADER_BYTES - 8
    for key in keys:
        bench.cache.set(key, "x")
    bench.cache.set("rest", "x" * room)
    bench.cache.delete_many(["a", "0", "2"])
    long_key = "k" * 70
    bench.cache.set(long_key, "v" * 40)
    assert bench.cache.get(long_key) == "v" * 40
    assert bench.cache.get("k" * 69 + "l") is None
    bench.cache.set(long_key, 7)
    assert bench.cache.incr(long_key) == 8
    assert bench.cache.delete(long_key)


def test_a_free_run_without_length_is_not_taken(bench: Bench) -> None:
    bench.block(2, layout.RUN_FREE << 32)
    assert bench.blocks.reserve(10) is False
    assert bench.blocks.reserved == 0


def test_a_run_is_not_merged_with_one_that_begins_behind_it(bench: Bench) -> None:
    """It says that the one before is free, whose last word, which is a value's, says nonsense."""
    bench.block(0, 100, 7)
    bench.block(1, (1 | layout.RUN_AFTER_FREE) << 32)
    assert bench.cache.delete("b") is True
    assert bench.cache.get("a") == "value of a"
    assert bench.blocks.length(1) >= 1


def test_a_bin_that_leads_to_an_entry_is_begun_anew(bench: Bench) -> None:
    number = bench.blocks.bin_of(1)
    store(bench.words, bench.region.bins + layout.BIN_BITMAP_WORDS + number, 1)
    bench.cache.set("c", "x")
    assert bench.cache.delete("b") is True
    bench.blocks.drain()
    assert load(bench.words, bench.region.bins + layout.BIN_BITMAP_WORDS + number) == 2
    assert bench.cache.get("a") == "value of a"


@pytest.mark.parametrize("links", [pack(1, 0), pack(0, 1), pack(1, 2)])
def test_a_neighbour_in_a_bin_that_is_an_entry_is_left_alone(bench: Bench, links: int) -> None:
    bench.block(2, links, 1)
    entries = slice(bench.region.blocks * 8, (bench.region.blocks + 2 * BLOCK_WORDS) * 8)
    before = bytes(bench.blocks.data[entries])
    bench.blocks.unlink(2)
    assert bytes(bench.blocks.data[entries]) == before
    store(bench.words, bench.region.log, 0)


def test_a_free_run_is_looked_for_in_no_bin_that_there_is_not(bench: Bench) -> None:
    assert bench.blocks.used_bin(layout.BINS) == layout.BINS
    assert bench.blocks.fitting_bin((1 << 31) - 1) == layout.BINS


def test_reading_and_comparing_end_with_the_chain(bench: Bench) -> None:
    """It leads nowhere, it ends too early, it has a run without length, or it is a circle."""
    target = bytearray(1000)
    bench.block(1, pack(1, 0))
    held = bytes(bench.blocks.data[bench.blocks.at(1) * 8 + 8 : bench.blocks.at(1) * 8 + 64])
    assert bench.blocks.read(1, 0, target, 0, 56) is True
    assert bench.blocks.matches(1, held, 56) is True
    ends = {"short": 0, "nowhere": NOWHERE, "no length": 9, "circle": 2}
    bench.block(8, 0)
    for next_run in ends.values():
        bench.block(1, pack(1, next_run))
        size = 57 if next_run != 2 else 56 * (bench.count + 2)
        longer = held * (bench.count + 2)
        assert bench.blocks.read(1, 0, bytearray(size), 0, size) is False
        assert bench.blocks.matches(1, longer, size) is False
    bench.block(1, pack(1, 0))


def test_no_memory_is_read_or_written_but_what_there_is(bench: Bench) -> None:
    assert bench.blocks.read(1, 0, bytearray(8), 0, 9) is False
    short = Blocks(
        bench.words,
        bench.blocks.data[: bench.region.blocks * 8 + 70],
        bench.region.header,
        bench.region.log,
        bench.region.bins,
        bench.region.blocks,
        bench.count,
    )
    before = bytes(bench.blocks.data)
    short.write(1, 0, b"y" * 20, 20)
    assert bytes(bench.blocks.data) == before
    assert short.matches(1, before[bench.blocks.at(1) * 8 + 8 :], 20) is False
    bench.block(9, 0)
    bench.blocks.write(9, 0, b"y" * 20, 20)  # a run without length
    assert load(bench.words, bench.region.blocks + 9 * BLOCK_WORDS + 1) == 0
    store(bench.words, len(bench.words), 1)
    assert load(bench.words, len(bench.words)) == 0
    assert copy_in(bench.blocks.data, len(bench.blocks.data) - 1, b"yy", 2) is False
    assert copy(memoryview(bytearray(1)), 0, bench.blocks.data, 0, 2) is False
    assert write_number(memoryview(bytearray(2)), 0, 0xD3, 1, 8) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_another_key_of_the_same_tag_or_hash_is_passed_over(bench: Bench, whole: bool) -> None:
    """Without the lock and with it: the bytes decide."""
    key = "c"
    hash = key_hash(key.encode(), 1, layout.KEY_TEXT, *bench.cache._attachment.secret)
    bucket = bench.shard.table.bucket_of(hash)
    store(bench.words, bucket, hash >> 32 << 32 | 1)
    bench.slot(0, layout.E_CHAIN, 0)
    bench.slot(0, layout.E_HASH, hash if whole else hash ^ 1)
    assert bench.cache.get(key) is None
    assert bench.cache.delete(key) is False


# --- reading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [500, 0xFFFF_FFFF])
def test_a_value_longer_than_its_chain_or_than_any_is_refused(bench: Bench, size: int) -> None:
    for slot, key in enumerate("ab"):
        sizes = bench.read_slot(slot, layout.E_SIZES)
        bench.slot(slot, layout.E_SIZES, sizes >> 32 << 32 | size)
        with pytest.raises(CorruptSegment):
            bench.cache.get(key)
        with pytest.raises(CorruptSegment):
            list(bench.cache.items())
        bench.slot(slot, layout.E_SIZES, sizes)
        assert bench.cache.get(key) == f"value of {key}"


@pytest.mark.parametrize("value", [b"x" * 300, "x" * 300, "x" * 9000, "ä" * 9000, ["x" * 9000]])
def test_values_of_any_kind_and_size_are_found_whole_and_in_pieces(
    make_cache: Callable[..., Cache], value: Any
) -> None:
    cache = make_cache(max_bytes="200KB", max_entries=801, shards=1)
    shard = cache._attachment.shards[0]
    cache.set("key", value)
    assert cache.get("key") == value
    cache.delete("key")
    for number in range(800):
        cache.set(number, "x")
    free = load(shard.words, shard.header + layout.S_FREE_BLOCKS)
    cache.set(0, "x" * (free * BLOCK_BYTES))
    for number in range(1, 800, 2):
        cache.delete(number)
    cache.set("key", value)
    from shmcache.engine.store import shard_of  # compiled, it is there for C only

    request = Request()
    request.set_key("key")
    shard_of(request, cache._attachment.shards)
    place = load(shard.words, shard.at(shard.find_locked(request) - 1) + layout.E_PLACE)
    assert shard.blocks.place_of((place & 0xFFFF_FFFF) - 1, 300) == 0, "it was meant to be in pieces"
    assert cache.get("key") == cache.get_many(["key"])["key"] == cache["key"] == value
    cache.set("small", b"y")
    assert cache.get_many(["key", "small"]) == {"key": value, "small": b"y"}


def test_a_value_that_there_is_no_memory_for_twice_is_copied_to_what_there_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "new_bytes", lambda size: None)
    for size in (300, 9000):
        bench.cache.set("a", b"x" * size)
        assert bench.cache.get("a") == b"x" * size
        [(_, found)] = bench.cache._perform([(layout.OP_READ, "a", None, None)])
        assert found == b"x" * size


def test_memory_for_a_copy_is_none_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(size: int) -> bytearray:
        raise MemoryError

    monkeypatch.setattr(primitives, "bytearray", no_memory, raising=False)
    assert primitives.new_bytes(10) is None


def test_a_slot_that_changes_while_it_is_copied_is_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = 0

    def fence() -> None:
        nonlocal changes
        changes += 1
        if changes == 1:
            bench.slot(0, layout.E_VERSION, bench.read_slot(0, layout.E_VERSION) + 2)

    monkeypatch.setattr(reader, "fence_acquire", fence)
    assert bench.cache._scan(0, 1, True)[0] == [("a", "value of a")]
    assert changes > 1
    changes = 0
    assert bench.cache.get("a") == "value of a"
    assert changes > 1


def test_bytes_that_are_no_utf_8_are_refused(bench: Bench) -> None:
    """In a key and in values of either length."""
    for value in ("12345678", "1234567" * 5, "1234567" * 1000):
        bench.cache.set("a", value)
        run = (bench.read_slot(0, layout.E_PLACE) & 0xFFFF_FFFF) - 1
        at = (bench.region.blocks + run * BLOCK_WORDS + 1) * 8
        bench.blocks.data[at + 5] = 0xFF
        with pytest.raises(SerializationError):
            bench.cache.get("a")
        [(_, outcome)] = bench.cache._perform([(layout.OP_READ, "a", None, None)])
        assert isinstance(outcome, SerializationError)
    bench.blocks.data[at] = 0xFF
    with pytest.raises(CorruptSegment):
        bench.cache._scan(0, 1, False)
    bench.cache.repair()


def test_bytes_whose_size_is_not_theirs_are_refused(bench: Bench) -> None:
    for value in (b"12345678", "1234567" * 5, b"1234567" * 50, "1234567" * 1000):
        bench.cache.set("a", value)
        bench.slot(0, layout.E_SIZES, bench.read_slot(0, layout.E_SIZES) - 1)
        with pytest.raises(SerializationError):
            bench.cache.get("a")
        bench.slot(0, layout.E_SIZES, bench.read_slot(0, layout.E_SIZES) + 1)


def test_a_number_of_another_size_is_none(bench: Bench) -> None:
    bench.cache.set("a", 300)
    bench.slot(0, layout.E_SIZES, bench.read_slot(0, layout.E_SIZES) - 1)
    with pytest.raises(TypeError, match="not an integer"):
        bench.cache.incr("a")
    bench.slot(0, layout.E_SIZES, bench.read_slot(0, layout.E_SIZES) + 1)
    assert bench.cache.incr("a") == 301


def test_a_number_that_its_chain_does_not_hold_is_none(bench: Bench) -> None:
    key = "k" * 50
    bench.cache.set(key, 5)
    bench.slot(2, layout.E_SIZES, bench.read_slot(2, layout.E_SIZES) + 8)
    with pytest.raises(TypeError, match="not an integer"):
        bench.cache.incr(key)
    bench.slot(2, layout.E_SIZES, bench.read_slot(2, layout.E_SIZES) - 8)
    assert bench.cache.incr(key) == 6


def test_scratch_memory_is_kept_while_it_is_small() -> None:
    request = Request()
    request.room = 10
    request.make_room()
    first = request.scratch
    assert len(first) == layout.SCRATCH
    request.make_room()
    assert request.scratch is first
    request.room = 2_000_000
    request.make_room()
    assert len(request.scratch) == 2_000_000
    request.release()
    assert len(request.scratch) == layout.SCRATCH


@pytest.mark.parametrize("size", [0, 31, 32, 0xFF, 0x100, 0xFFFF, 0x10000])
def test_the_head_of_a_value_is_that_of_msgpack(size: int) -> None:
    for value in ("x" * size, b"x" * size):
        request = Request()
        request.set_value(value, None)
        head = bytes(request.small[layout.HEAD_AT : layout.HEAD_AT + request.head_size])
        assert msgpack.unpackb(head + b"x" * size) == value
        assert len(head) == len(msgpack.packb(value)) - size


def test_a_value_of_4_gib_has_no_head() -> None:
    assert _below_4_gib((1 << 32) - 1) == (1 << 32) - 1
    with pytest.raises(ValueTooLarge, match="4 GiB"):
        _below_4_gib(1 << 32)


# --- writing --------------------------------------------------------------------------------------------------------
def test_blocks_that_no_eviction_frees_are_not_waited_for(bench: Bench) -> None:
    bench.header(layout.S_FREE_BLOCKS, 0)
    bench.header(layout.S_ORDER, 0)
    with pytest.raises(CorruptSegment):
        bench.cache.set("n", "new")
    [(_, outcome)] = bench.cache._perform([(layout.OP_SET, "n", "new", None)])
    assert isinstance(outcome, CorruptSegment)


@pytest.mark.parametrize("limbo", ["a free run", "outside", "a chain that leads outside", "a circle"])
def test_a_limbo_that_is_no_chain_is_given_up(bench: Bench, limbo: str) -> None:
    """What it was is found by `check` and freed by `repair`."""
    bench.cache.set("n", "new")
    bench.cache.delete("n")
    run = load(bench.words, bench.region.header + layout.S_LIMBO)
    assert run
    if limbo in ("a chain that leads outside", "a circle"):
        bench.block(run - 1, pack(1, NOWHERE if limbo == "a chain that leads outside" else run))
    else:
        bench.header(layout.S_LIMBO, run + 1 if limbo == "a free run" else bench.count + 1)
    bench.cache.set("n", "newer" * 100)
    assert load(bench.words, bench.region.header + layout.S_LIMBO) == 0
    assert bench.cache.get("n") == "newer" * 100
    assert bench.cache.get("a") == "value of a"
    bench.cache.repair()
    assert bench.cache.check() == []
    assert bench.cache.get("n") == "newer" * 100


def test_a_run_that_waits_in_limbo_is_taken_if_it_is_just_as_long(bench: Bench) -> None:
    def limbo() -> int:
        return load(bench.words, bench.region.header + layout.S_LIMBO)

    free = bench.cache.stats().bytes_free
    bench.cache.set("n", "x" * 40)  # with its key and heads, two blocks
    bench.cache.delete("n")
    assert bench.cache.stats().bytes_free == free
    waiting = limbo()
    bench.cache.set("m", "y" * 50)
    assert limbo() == 0
    assert low(bench.read_slot(2, layout.E_PLACE)) == waiting
    bench.cache.set("m", "z" * 50)
    assert limbo() == waiting
    bench.cache.set("k", "k" * 150)  # longer: what waits is freed
    assert limbo() == 0
    bench.cache.set("k", "k" * 5000)
    bench.cache.delete("k")
    assert limbo() == 0, "a long one does not wait"
    bench.cache.delete("m")
    assert bench.cache.stats().bytes_free == free
    assert bench.cache.check() == []


def test_what_an_interrupted_write_had_reserved_counts_as_free(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or several; nobody frees it until somebody needs room."""
    for number in range(4):
        bench.cache.set(f"{number}", "x")
    for number in (1, 3):
        bench.cache.delete(f"{number}")
    free = bench.cache.stats().bytes_free

    def interrupt(request: Request) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "write_entry", interrupt)
        for size in (40, free - 500):
            with pytest.raises(KeyboardInterrupt):
                bench.cache.set("n", "n" * size)
            assert load(bench.words, bench.region.header + layout.S_LIMBO)
            assert bench.cache.stats().bytes_free == free
    bench.header(layout.S_LIMBO, 1)
    bench.block(0, pack(0, 1))  # a circle of nothing
    assert bench.cache.stats().bytes_free <= 2 * bench.count * BLOCK_BYTES


def test_check_counts_no_run_that_waits(bench: Bench) -> None:
    bench.cache.delete("a")
    assert load(bench.words, bench.region.header + layout.S_LIMBO)
    assert bench.cache.check() == []
    assert load(bench.words, bench.region.header + layout.S_LIMBO) == 0


def test_a_free_slot_that_there_is_not_is_not_filled(bench: Bench) -> None:
    bench.header(layout.S_FREE_SLOT, SLOTS + 1)
    with pytest.raises(CorruptSegment):
        bench.cache.set("n", "new")
    assert bench.cache.get("a") == "value of a"


def test_an_expired_entry_that_cannot_be_removed_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.slot(0, layout.E_EXPIRY, 1)  # in no list of the timer wheel
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard.table, "unlink", lambda slot: False)  # as if it changed since it was found
        with pytest.raises(CorruptSegment):
            bench.cache.set("a", "new")


def test_an_order_that_leads_outside_the_table_evicts_nothing(bench: Bench) -> None:
    bench.header(layout.S_ORDER, pack(SLOTS + 1, SLOTS + 1))
    bench.header(layout.S_FREE_SLOT, 0)
    bench.header(layout.S_ENTRIES, SLOTS)
    with pytest.raises(CorruptSegment):
        bench.cache.set("n", "new")
    assert bench.shard.remove_locked(SLOTS) == layout.CORRUPT


def test_a_purge_of_what_no_bucket_leads_to_is_an_error(bench: Bench) -> None:
    for slot in range(SLOTS):
        store(bench.words, bench.region.buckets + slot, 0)
    bench.clock.advance(100)
    with pytest.raises(CorruptSegment):
        bench.cache.purge()


def test_what_has_expired_is_evicted_first(bench: Bench) -> None:
    """Where one write may remove four by itself and needs the blocks of more."""
    bench.cache.clear()
    value = "x" * (bench.count // SLOTS * BLOCK_BYTES - 100)
    for number in range(SLOTS):
        bench.cache.set(number, value, None if number == 0 else 60)
    bench.clock.advance(100)
    bench.cache.set("n", value * 6)
    assert list(bench.cache) == [0, "n"] or list(bench.cache) == ["n", 0]
    stats = bench.cache.stats()
    assert (stats.evictions, stats.expirations) == (0, 7)


def test_what_cannot_be_logged_is_not_stored(bench: Bench) -> None:
    """Neither a word that is not there, nor one for which the log has no room."""
    log, word = bench.region.log, bench.region.header + layout.S_PEAK_BYTES
    before = load(bench.words, word)
    logged_store(bench.words, log, len(bench.words), 1)
    assert load(bench.words, log) == 0
    store(bench.words, log, layout.LOG_ENTRIES)
    logged_store(bench.words, log, word, before + 1)
    assert load(bench.words, word) == before
    store(bench.words, log, 0)


# --- recovery -------------------------------------------------------------------------------------------------------
def test_a_clear_that_died_is_finished(bench: Bench) -> None:
    bench.header(layout.S_STATE, layout.STATE_CLEARING)
    assert bench.cache.delete("nothing") is False
    assert len(bench.cache) == 0


def test_a_recovery_that_fails_gives_the_lock_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, for instance: the next one tries again."""

    def fail(shard: object, rebuild: bool) -> list[str]:
        raise MemoryError

    bench.header(layout.S_STATE, layout.STATE_REPAIRING)
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "inspect_locked", fail)
        with pytest.raises(MemoryError):
            bench.cache.delete("nothing")
        assert load(bench.words, bench.region.header + layout.S_LOCK) == 0
    assert bench.cache.get("a") == "value of a"
    assert bench.cache.delete("nothing") is False


# --- a cache that is closed half way --------------------------------------------------------------------------------
def test_what_finds_no_shards_says_that_the_cache_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread has closed it since the operation began."""
    attachment = bench.cache._attachment
    monkeypatch.setattr(bench.cache, "_now", bench.clock)
    bench.cache._abandon()
    for operation in (
        lambda: bench.cache.get("a"),
        lambda: bench.cache.set("a", 1),
        lambda: bench.cache.set_many({"a": 1}),
        bench.cache.purge,
        bench.cache.check,
        bench.cache.stats,
    ):
        with pytest.raises(CacheClosed):
            operation()
    bench.cache._adopt(attachment, 0, bench.cache._process_epoch())


@pytest.mark.parametrize(
    "operation",
    [lambda cache: cache._attached() and None, lambda cache: cache.get("missing"), lambda cache: cache.clear()],
)
def test_what_finds_no_shards_while_another_thread_moves_us_waits_for_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Cache], object]
) -> None:
    attachment, epoch = bench.cache._attachment, bench.cache._epoch
    bench.cache._abandon()
    bench.cache._epoch = epoch  # from here on, the operation had looked already
    monkeypatch.setattr(bench.cache, "_reattach", lambda old: bench.cache._adopt(attachment, 0, epoch))
    assert operation(bench.cache) is None
    assert bench.cache._attachment is attachment


def test_a_request_that_was_performed_is_not_when_its_group_begins_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.shard.run
    calls = 0

    def run(requests: list[Request], *args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert real(requests[:1], *args) == 1
            raise CacheClosed("meanwhile")
        return int(real(requests, *args))

    monkeypatch.setattr(bench.shard, "run", run)
    with bench.cache.batch() as batch:
        sums = [batch.incr("n", initial=0) for _ in range(3)]
    assert [each.value for each in sums] == [1, 2, 3]
    assert calls == 2


def test_a_cache_that_another_thread_closes_stays_closed(bench: Bench) -> None:
    """Even for a forked child's thread that was just taking a line of the process table, and believes to be through."""
    attachment = bench.cache._attachment
    bench.cache._closed = True
    with pytest.raises(CacheClosed):
        bench.cache._reattach(attachment)
    bench.cache._closed = False


@pytest.mark.parametrize("moved", [True, False])
def test_a_forked_child_that_another_thread_moves_while_it_joins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    attachment = bench.cache._attachment
    epoch = bench.cache._epoch

    def join(timeout: float) -> None:
        if moved:
            bench.cache._abandon()
            bench.cache._adopt(copy_object(attachment), 0, epoch)
        raise CacheClosed("meanwhile")

    bench.cache._epoch = epoch + 1
    with monkeypatch.context() as patch:
        patch.setattr(attachment.member, "join", join)
        if moved:
            assert bench.cache.get("a") == "value of a"
        else:
            with pytest.raises(CacheClosed, match="meanwhile"):
                bench.cache.get("a")
    bench.cache._adopt(attachment, 0, epoch)


def test_figures_of_an_attachment_that_was_let_go_are_gathered_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = bench.cache._attachment
    truly_collect = stats.collect
    calls = 0

    def collect(of: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            bench.cache._attachment = None
            bench.cache._epoch = ADRIFT
            raise IndexError
        return truly_collect(of)

    def reattach(old: Any) -> None:
        bench.cache._adopt(attachment, 0, process_epoch())

    monkeypatch.setattr("shmcache.stats.collect", collect)
    monkeypatch.setattr(bench.cache, "_reattach", reattach)
    assert bench.cache.stats().entries == len(bench.cache)
    assert calls == 2
    monkeypatch.setattr("shmcache.stats.collect", lambda of: {}[of])
    with pytest.raises(KeyError):
        bench.cache.stats()


def test_a_cache_closed_while_it_looks_at_its_files_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = bench.cache._epoch

    def close() -> bool:
        bench.cache._epoch = CLOSED
        return True

    monkeypatch.setattr(bench.cache._attachment, "is_current", close)
    bench.clock.advance(1)
    with pytest.raises(CacheClosed):
        bench.cache.get("a")
    bench.cache._epoch = epoch
    bench.cache._next_check = bench.clock() + layout.CHECK_NS
    assert bench.cache.get("a") == "value of a"


@pytest.mark.parametrize("closed", [True, False])
def test_a_reader_whose_cache_goes_while_it_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """Closed, it says so; unlinked, there is nothing."""
    epoch = bench.cache._epoch

    def run_one(*args: object) -> int:
        if closed:
            bench.cache._epoch = CLOSED
        raise CacheClosed("meanwhile")

    bench.slot(0, layout.E_VERSION, bench.read_slot(0, layout.E_VERSION) | 1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "run_one", run_one)
        if closed:
            with pytest.raises(CacheClosed):
                bench.cache.get("a")
        else:
            assert bench.cache.get("a") is None
    bench.cache._epoch = epoch


@pytest.mark.parametrize("moving", [True, False])
def test_a_reader_waits_for_writers_that_work_and_not_for_one_that_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moving: bool
) -> None:
    tries = 0

    def run_one(*args: object) -> int:
        nonlocal tries
        tries += 1
        if moving:
            bench.header(layout.S_STAMP, load(bench.words, bench.region.header + layout.S_STAMP) + 2)
        raise LockTimeout("meanwhile")

    bench.slot(0, layout.E_VERSION, bench.read_slot(0, layout.E_VERSION) | 1)
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "run_one", run_one)
        assert bench.cache.get_many(["a", "b"]) == {"b": "value of b"}
        assert tries == (layout.READ_WAITS if moving else 1)
        bench.slot(1, layout.E_VERSION, bench.read_slot(1, layout.E_VERSION) | 1)
        assert bench.cache.get_many(["a", "b"]) == {}
        assert tries == (2 * layout.READ_WAITS if moving else 2), "once a call, not once a key"


def test_room_is_not_made_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be evicted a hundred times in a row, the segment is wrong."""
    request = Request()
    request.status = layout.UNDONE
    assert bench.cache._make_way(request, bench.cache._shards, 0) == 0
    request.status = layout.FULL
    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "run_one", lambda *args: layout.ABSENT)
        for _ in range(100):
            assert bench.cache._make_way(request, bench.cache._shards, 0) == 0
        with pytest.raises(CorruptSegment):
            bench.cache._make_way(request, bench.cache._shards, 0)


def test_arguments_that_are_none_of_theirs(bench: Bench) -> None:
    assert repr(DEFAULT) == "DEFAULT"
    with pytest.raises(TypeError, match="mapping"):
        bench.cache.set_many(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not one key"):
        bench.cache.get_many("a")


# --- byte locks -----------------------------------------------------------------------------------------------------
def test_a_thread_that_would_wait_for_itself_is_refused() -> None:
    mutex = bytelock.Mutex()
    mutex.refuse_reentry()
    with mutex.lock:
        mutex.refuse_reentry()  # another thread's
        mutex.owner = threading.get_ident()
        with pytest.raises(LockTimeout, match="middle of a cache operation"):
            mutex.refuse_reentry()


def test_the_setup_lock_of_a_closed_file(tmp_path: Any) -> None:
    with open(tmp_path / "lock", "w") as file:
        number = file.fileno()
        assert bytelock.under_setup_lock(number, 1, lambda: "done") == "done"
    for fd in (-1, number):
        with pytest.raises(CacheClosed):
            bytelock.under_setup_lock(fd, 1, lambda: "never")


def test_an_error_that_says_nothing_of_locks_is_not_hidden(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with open(tmp_path / "lock", "w") as file:
        monkeypatch.setattr(fcntl, "lockf", full)
        with pytest.raises(OSError, match="no locks"):
            bytelock.under_setup_lock(file.fileno(), 1, lambda: "never")


def test_the_setup_lock_is_not_waited_for_longer_than_asked(tmp_path: Any) -> None:
    """Another process has it; and who has which byte is known to the kernel."""
    path = tmp_path / "lock"
    gate = Gate()
    with open(path, "w") as file:

        def hold() -> None:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX, 1, bytelock.SETUP_BYTE)
            gate.wait()

        child = Child(hold)
        until(lambda: bytelock.is_byte_locked(file.fileno(), bytelock.SETUP_BYTE))
        with pytest.raises(LockTimeout, match="longer than lock_timeout allows"):
            bytelock.under_setup_lock(file.fileno(), 0.002, lambda: "never")
        if os.path.exists("/proc/locks"):
            assert bytelock.holders(path) == {bytelock.SETUP_BYTE: child.pid}
        gate.open()
        assert child.wait() == 0
    assert bytelock.holders(tmp_path / "nothing") is None


def test_a_compare_and_swap_waits_for_another_but_not_for_one_that_is_stopped(tmp_path: Any) -> None:
    with open(tmp_path / "lock", "w") as file:
        gate, guard = Gate(), bytelock.Guard(file.fileno())

        def hold() -> None:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX, 1, bytelock.ATOMIC_BYTE)
            gate.wait()

        child = Child(hold)
        until(lambda: bytelock.is_byte_locked(file.fileno(), bytelock.ATOMIC_BYTE))
        assert guard.take() is False
        gate.open()
        assert child.wait() == 0
        assert guard.take() is True


def test_a_compare_and_swap_with_a_lock_file_that_was_closed_is_an_error(tmp_path: Any) -> None:
    """Also where the number is another file's by now: locking that would exclude nobody."""
    words = memoryview(bytearray(8)).cast("Q")
    file = open(tmp_path / "lock", "w")  # noqa: SIM115
    guard = bytelock.Guard(file.fileno())
    file.close()
    with open(tmp_path / "another", "w") as another:
        guard.fd = another.fileno()
        with pytest.raises(CacheClosed):
            primitives.compare_and_swap(words, 0, 0, 1, guard)
    with pytest.raises(CacheClosed):
        primitives.compare_and_swap(words, 0, 0, 1, guard)
    assert words[0] == guard.mutex.owner == 0


# --- interpreters ---------------------------------------------------------------------------------------------------
def test_a_python_without_sub_interpreters_has_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert engine._is_main_interpreter()


def test_a_sub_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one is in test_forks.py; what runs in it cannot be watched."""
    interpreters = SimpleNamespace(get_current=lambda: 1, get_main=lambda: 0)
    monkeypatch.setattr(importlib, "import_module", lambda name: interpreters)
    with pytest.raises(ImportError, match="WSGIApplicationGroup"):
        runpy.run_path(str(engine.__file__))


# --- a child that is forked in the midst of something ---------------------------------------------------------------
# What a real one does is in test_identity.py; here each step notices that the process is another one now.
FORKED = "this process was forked in the midst of a cache operation"


def another_process(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "process_epoch", lambda: 1)


@pytest.mark.parametrize("released", [True, False])
def test_work_under_the_setup_lock_is_the_parents(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, released: bool
) -> None:
    """Also where it ends with the segment's views released."""

    def work() -> None:
        another_process(monkeypatch, bytelock)
        if released:
            raise ValueError("operation forbidden on released memoryview object")

    with open(tmp_path / "lock", "w") as file, pytest.raises(LockTimeout, match=FORKED):
        bytelock.under_setup_lock(file.fileno(), 1, work)


def test_an_error_of_work_under_the_setup_lock_is_its_own(tmp_path: Any) -> None:
    def work() -> None:
        raise ValueError("of its own")

    with open(tmp_path / "lock", "w") as file, pytest.raises(ValueError, match="of its own"):
        bytelock.under_setup_lock(file.fileno(), 1, work)


def test_a_line_that_is_taken_is_the_parents(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = bench.cache._attachment.member.registry
    epoch, line = registry._own_epoch, registry.own_line
    before = bytes(bench.cache._attachment.data[: bench.region.header * 8])

    def lock_a_line() -> int:
        another_process(monkeypatch, membership)
        return 5

    registry._own_epoch = 0
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_lock_a_line", lock_a_line)
        with pytest.raises(LockTimeout, match=FORKED):
            registry._take_line()
    monkeypatch.undo()
    assert bytes(bench.cache._attachment.data[: bench.region.header * 8]) == before
    assert (registry._own_epoch, registry.own_line) == (0, line)
    registry._own_epoch = epoch


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("forked", [True, False])
def test_what_is_the_parents_to_finish_is_an_error_that_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, forked: bool, error: type[Exception]
) -> None:
    """In a child, views were released, and the mutex; without a fork an error stays what it is."""

    def record_hit_locked(request: Request) -> None:
        if forked:
            patch.setattr(shard, "process_epoch", lambda: 1)
        raise error("of its own")

    with monkeypatch.context() as patch:
        patch.setattr(bench.shard, "record_hit_locked", record_hit_locked)
        expected, match = (LockTimeout, FORKED) if forked else (error, "of its own")
        with pytest.raises(expected, match=match):
            bench.shard.promote(Request())
    bench.header(layout.S_LOCK, 0)
    assert bench.cache.get("a") == "value of a"


# --- what a process is known by -------------------------------------------------------------------------------------
def test_what_vanished_threads_have_is_given_back() -> None:
    mine, theirs, free = bytelock.Mutex(), bytelock.Mutex(), bytelock.Mutex()
    own, other, nobodys = threading.RLock(), threading.RLock(), threading.RLock()

    def vanish() -> None:
        theirs.lock.acquire()
        theirs.owner = threading.get_ident()
        other.acquire()

    thread = threading.Thread(target=vanish)
    thread.start()
    thread.join()
    with mine.lock, own:
        mine.owner = threading.get_ident()
        bytelock.release_abandoned([mine, theirs, free, own, other, nobodys])
        assert mine.is_mine()
        assert own._is_owned()  # type: ignore[attr-defined]
        for lock in (theirs.lock, free.lock, other, nobodys):
            assert lock.acquire(blocking=False)
            lock.release()


def test_a_child_that_waited_for_a_mutex_does_no_work_of_its_parent(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = iter((1, 2, 2))
    monkeypatch.setattr(bytelock, "process_epoch", lambda: next(epochs))
    with open(tmp_path / "lock", "w") as file, pytest.raises(LockTimeout, match=FORKED):
        bytelock.under_setup_lock(file.fileno(), 1, lambda: pytest.fail("it was done"))


def test_a_proc_of_another_pid_namespace_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert membership.pid_namespace() > 0
    monkeypatch.setattr(os, "readlink", lambda path: "1")
    assert membership.pid_namespace() == 0

    def missing(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", missing)
    assert membership.pid_namespace() == 0


def test_who_runs_without_a_lock_is_given_a_second(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And after a minute another one, for it may have lost its lock once more."""
    registry = bench.cache._attachment.registry
    second, minute = membership.GRACE_NS, membership.DOUBT_NS
    asked_at = iter((5, second, second + 5, minute, minute + 6))
    monkeypatch.setattr(registry, "_runs", lambda line: True)
    monkeypatch.setattr(membership, "precise_ns", lambda: next(asked_at))
    assert [registry._is_given_time(7 << 48 | 1, 7) for _ in range(5)] == [True, True, False, False, True]


def test_totals_are_the_same_while_what_a_dead_process_counted_is_added(bench: Bench) -> None:
    registry, words = bench.cache._attachment.registry, bench.cache._attachment.words
    words[layout.H_TOTALS] = 5
    words[registry.line(3) + layout.P_COUNTERS] = 7
    before = registry.counter(0)
    words[layout.H_FOLDED] = 12
    words[layout.H_FOLDING] = 4
    assert registry.counter(0) == before
    words[layout.H_TOTALS] = 12  # it died on the way
    assert registry.counter(0) == before
    registry._finish_fold()
    assert registry.counter(0) == before
    assert words[layout.H_FOLDING] == words[registry.line(3) + layout.P_COUNTERS] == 0
    words[layout.H_FOLDING] = 1 << 40  # nonsense
    registry._finish_fold()
    assert words[layout.H_FOLDING] == 0
