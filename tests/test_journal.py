"""Transactions and the table by themselves, step by step: what each method stores, and in which order.

On the sources, where each store can be watched. That all of it together survives a death before any store is in
tests/torture/faults.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shmcache import Cache, is_compiled
from shmcache.engine import journal, layout, table
from shmcache.engine.primitives import MASK, load, logged_store, pack, store

pytestmark = pytest.mark.skipif(is_compiled(), reason="steps through the sources")

SLOTS = 8


class Bench:
    """One shard of a real segment, and what is stored in it from `watch` on."""

    def __init__(self, cache: Cache) -> None:
        attachment = cache._attachment
        self.words = attachment.words
        self.shard: Any = attachment.shards[0]
        self.region = attachment.geometry.region(0)
        self.journal = self.shard.journal
        self.table = self.shard.table
        self.stores: list[tuple[int, int]] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def watched(words: memoryview, index: int, value: int) -> None:
            self.stores.append((index, value))
            store(words, index, value)

        for module in (journal, table):
            for name in ("store", "store_release"):
                monkeypatch.setattr(module, name, watched)

    def header(self, field: int) -> int:
        return load(self.words, self.region.header + field)

    def set_header(self, field: int, value: int) -> None:
        store(self.words, self.region.header + field, value)

    def slot(self, slot: int, field: int) -> int:
        return load(self.words, self.slot_at(slot, field))

    def slot_at(self, slot: int, field: int) -> int:
        return int(self.region.slots) + slot * layout.SLOT_WORDS + field

    def log(self) -> list[tuple[int, int]]:
        """The undo log: word indexes and old values."""
        at = self.region.log + layout.L_ENTRIES
        used = range(load(self.words, self.region.log + layout.L_USED))
        return [(load(self.words, at + 2 * entry), load(self.words, at + 2 * entry + 1)) for entry in used]

    def chain(self, bucket: int) -> list[int]:
        """The slots of a bucket."""
        found = []
        link = load(self.words, bucket)
        while link:
            found.append((link & 0xFFFF_FFFF) - 1)
            link = self.slot(found[-1], layout.E_CHAIN)
        return found

    def free(self) -> list[int]:
        """The free slots, in their order."""
        found = []
        slot = self.header(layout.S_FREE_SLOT)
        while slot:
            found.append(slot - 1)
            slot = self.slot(slot - 1, layout.E_CHAIN)
        return found


@pytest.fixture
def bench(make_cache: Callable[..., Cache]) -> Bench:
    return Bench(make_cache(max_bytes="64KB", max_entries=SLOTS, shards=1))


@pytest.fixture
def broken(make_cache: Callable[..., Cache]) -> Any:
    """A bench whose shard is put in order at the end of the test."""
    cache = make_cache(max_bytes="64KB", max_entries=SLOTS, shards=1)
    yield Bench(cache)
    cache.clear()


# --- transactions ---------------------------------------------------------------------------------------------------
def test_begin_and_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is odd from `begin` to after the commit, which is the emptying of the log."""
    stamp = bench.header(layout.S_STAMP)
    at = bench.region.header
    bench.watch(monkeypatch)
    bench.journal.begin(3)
    assert bench.stores == [
        (at + layout.S_STAMP, stamp + 2),
        (at + layout.S_SUBJECT, 4),
        (bench.slot_at(3, layout.E_VERSION), stamp + 1),
    ]
    bench.journal.add(layout.S_ENTRIES, 5)
    assert bench.header(layout.S_ENTRIES) == 5
    bench.journal.add(layout.S_ENTRIES, MASK)  # -1
    assert bench.header(layout.S_ENTRIES) == 4
    assert bench.log() == [(at + layout.S_ENTRIES, 0), (at + layout.S_ENTRIES, 5)]
    bench.stores.clear()
    bench.journal.commit(3)
    assert bench.stores == [
        (bench.region.log, 0),
        (bench.slot_at(3, layout.E_VERSION), stamp + 2),
        (at + layout.S_SUBJECT, 0),
    ]
    bench.set_header(layout.S_ENTRIES, 0)


def test_commit_of_the_order_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.journal.add(layout.S_TICK, 1)
    bench.watch(monkeypatch)
    bench.journal.commit_order()
    assert bench.stores == [(bench.region.log, 0)]
    assert bench.header(layout.S_TICK) == 1


def test_roll_back_restores_the_newest_first_and_moves_versions_forward(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp, sequence = bench.header(layout.S_STAMP), bench.header(layout.S_SEQUENCE)
    at, log = bench.region.header, bench.region.log
    bench.journal.begin(7)
    word = at + layout.S_USED_BYTES
    for value in (10, 20, 30):
        logged_store(bench.words, log, word, value)
    bench.watch(monkeypatch)
    bench.journal.roll_back()
    assert bench.stores == [
        (at + layout.S_SEQUENCE, sequence | 1),
        (word, 20),
        (word, 10),
        (word, 0),
        (log, 0),
        (at + layout.S_STAMP, stamp + 4),
        (bench.slot_at(7, layout.E_VERSION), stamp + 4),
        (at + layout.S_SUBJECT, 0),
        (at + layout.S_SEQUENCE, (sequence | 1) + 1),
    ]


def test_roll_back_of_nothing_moves_the_sequence_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that a dead owner left odd becomes even, and never what it was before."""
    at = bench.region.header
    bench.set_header(layout.S_SEQUENCE, 41)
    bench.watch(monkeypatch)
    bench.journal.roll_back()
    assert bench.stores == [
        (at + layout.S_SEQUENCE, 41),
        (bench.region.log, 0),
        (at + layout.S_SUBJECT, 0),
        (at + layout.S_SEQUENCE, 42),
    ]


@pytest.mark.parametrize(("subject", "moves"), [(1, True), (SLOTS, True), (SLOTS + 1, False), (1 << 63, False)])
def test_roll_back_believes_only_a_subject_that_can_be(bench: Bench, subject: int, moves: bool) -> None:
    stamp = bench.header(layout.S_STAMP)
    bench.set_header(layout.S_SUBJECT, subject)
    bench.journal.roll_back()
    assert bench.header(layout.S_STAMP) == stamp + 2 * moves
    assert bench.header(layout.S_SUBJECT) == 0
    if moves:
        assert bench.slot(subject - 1, layout.E_VERSION) == stamp + 2


def test_roll_back_touches_nothing_that_no_transaction_changes(make_cache: Callable[..., Cache]) -> None:
    """A log of nonsense is not believed: a word that is another's stays, and so do the lock and every version."""
    bench = Bench(make_cache(max_bytes="128KB", max_entries=SLOTS, shards=2))
    header, first, last = bench.region.header, bench.region.header + layout.S_TICK, bench.region.end - 1
    outside = [0, 1, layout.H_BYTES, header - 1, last + 1, last + 2, 1 << 63]
    outside += [header + layout.S_LOCK, first - 1, bench.region.slots + layout.E_VERSION]
    before = {word: load(bench.words, word) for word in outside}
    old_first, old_last = load(bench.words, first), load(bench.words, last)
    at = bench.region.log + layout.L_ENTRIES
    for number, word in enumerate([*outside, first, last]):
        store(bench.words, at + 2 * number, word)
        store(bench.words, at + 2 * number + 1, 0xABCD)
    store(bench.words, bench.region.log, len(outside) + 2)
    bench.journal.roll_back()
    assert {word: load(bench.words, word) for word in outside} == before
    assert (load(bench.words, first), load(bench.words, last)) == (0xABCD, 0xABCD)
    store(bench.words, first, old_first)
    store(bench.words, last, old_last)


def test_a_transaction_changes_what_is_its_own(make_cache: Callable[..., Cache]) -> None:
    """No lock, no version, not the log itself, and nothing of another shard."""
    bench = Bench(make_cache(max_bytes="128KB", max_entries=SLOTS, shards=2))
    region, slots = bench.region, bench.journal.slots
    versions = range(region.slots, region.slots + slots * layout.SLOT_WORDS, layout.SLOT_WORDS)
    own = {region.header + layout.S_LIMBO, *range(region.header + layout.S_TICK, region.log)}
    own |= set(range(region.bins, region.end)) - set(versions)
    assert {word for word in range(len(bench.words)) if bench.journal.is_logged(word)} == own


@pytest.mark.parametrize("used", [layout.LOG_ENTRIES, layout.LOG_ENTRIES + 1, 1 << 40])
def test_roll_back_of_a_log_that_is_too_long_takes_all_there_is(bench: Bench, used: int) -> None:
    at = bench.region.log + layout.L_ENTRIES
    words = range(bench.region.end - layout.LOG_ENTRIES, bench.region.end)
    for number, word in enumerate(words):
        store(bench.words, at + 2 * number, word)
        store(bench.words, at + 2 * number + 1, 1000 + number)
    beyond = at + 2 * layout.LOG_ENTRIES  # words that only a longer log would take for an entry
    assert beyond < bench.region.bins
    store(bench.words, beyond, bench.region.header + layout.S_PEAK_BYTES)
    before = [load(bench.words, word) for word in words]
    store(bench.words, bench.region.log, used)
    bench.journal.roll_back()
    assert [load(bench.words, word) for word in words] == list(range(1000, 1000 + layout.LOG_ENTRIES))
    assert bench.header(layout.S_PEAK_BYTES) == 0
    assert bench.log() == []
    for word, value in zip(words, before, strict=True):
        store(bench.words, word, value)
    store(bench.words, beyond, 0)


# --- buckets and free slots -----------------------------------------------------------------------------------------
def test_buckets_divide_the_lower_half_of_the_hash_evenly(bench: Bench) -> None:
    step = (1 << 32) // SLOTS
    for bucket in range(SLOTS):
        for hash in (bucket * step, (bucket + 1) * step - 1):
            for upper in (0, 0xFFFF_FFFF):
                assert bench.table.bucket_of(upper << 32 | hash) == bench.region.buckets + bucket


def test_link_and_unlink_in_every_place_of_a_chain(broken: Bench) -> None:
    """The newest is first; what is taken out leaves the others in order; every word is logged before it changes."""
    hashes = [tag << 32 | 5 for tag in (11, 12, 13)]
    bucket = broken.table.bucket_of(5)
    for gone in range(3):
        store(broken.words, bucket, 0)
        for slot, hash in enumerate(hashes):
            store(broken.words, broken.slot_at(slot, layout.E_HASH), hash)
            store(broken.words, broken.slot_at(slot, layout.E_CHAIN), 0)
            before = load(broken.words, bucket)
            store(broken.words, broken.region.log, 0)
            broken.table.link(slot, hash)
            assert load(broken.words, bucket) == pack(hash >> 32, slot + 1)
            assert broken.slot(slot, layout.E_CHAIN) == before
            assert broken.log() == [(broken.slot_at(slot, layout.E_CHAIN), 0), (bucket, before)]
        assert broken.chain(bucket) == [2, 1, 0]
        store(broken.words, broken.region.log, 0)
        assert broken.table.unlink(gone) is True
        assert broken.chain(bucket) == [slot for slot in (2, 1, 0) if slot != gone]
        assert len(broken.log()) == 1
        assert broken.table.unlink(gone) is False
        assert len(broken.log()) == 1
    store(broken.words, broken.region.log, 0)


def test_unlink_finds_a_slot_at_the_end_of_the_longest_chain(broken: Bench) -> None:
    for slot in range(SLOTS):
        store(broken.words, broken.slot_at(slot, layout.E_HASH), 5)
        store(broken.words, broken.region.log, 0)
        broken.table.link(slot, 5)
    assert broken.table.unlink(0) is True
    assert broken.chain(broken.table.bucket_of(5)) == list(range(SLOTS - 1, 0, -1))
    store(broken.words, broken.region.log, 0)


def test_unlink_gives_up_in_a_circle(broken: Bench) -> None:
    for slot in range(3):
        store(broken.words, broken.slot_at(slot, layout.E_HASH), 5)
        store(broken.words, broken.slot_at(slot, layout.E_CHAIN), slot + 2)
    store(broken.words, broken.slot_at(2, layout.E_CHAIN), 1)
    store(broken.words, broken.table.bucket_of(5), 1)
    store(broken.words, broken.slot_at(6, layout.E_HASH), 5)
    assert broken.table.unlink(6) is False
    assert broken.log() == []


def test_free_slots_are_a_stack(broken: Bench) -> None:
    assert broken.free() == list(range(SLOTS))
    header = broken.region.header + layout.S_FREE_SLOT
    assert broken.table.take_free() == 1
    assert broken.log() == [(header, 1)]
    assert broken.table.take_free() == 2
    assert broken.free() == list(range(2, SLOTS))
    store(broken.words, broken.slot_at(0, layout.E_PLACE), pack(77, 3))
    store(broken.words, broken.region.log, 0)
    broken.table.give_free(0)
    assert broken.log() == [
        (broken.slot_at(0, layout.E_PLACE), pack(77, 3)),
        (broken.slot_at(0, layout.E_CHAIN), 2),
        (header, 3),
    ]
    assert broken.slot(0, layout.E_PLACE) == pack(77, 0)  # the tick of the last use stays
    assert broken.free() == [0, *range(2, SLOTS)]
    for _ in range(SLOTS - 1):
        store(broken.words, broken.region.log, 0)
        assert broken.table.take_free()
    store(broken.words, broken.region.log, 0)
    assert broken.table.take_free() == 0
    assert broken.free() == []
    assert broken.log() == []


def test_only_the_slot_of_a_free_link_counts(broken: Bench) -> None:
    """Its upper half may still have the tag of what was there."""
    store(broken.words, broken.slot_at(0, layout.E_CHAIN), pack(0x1234, 2))
    broken.table.take_free()
    assert broken.header(layout.S_FREE_SLOT) == 2


@pytest.mark.parametrize(("head", "taken"), [(SLOTS, SLOTS), (SLOTS + 1, 0), (1 << 63, 0)])
def test_a_free_slot_that_cannot_be_is_not_taken(broken: Bench, head: int, taken: int) -> None:
    broken.set_header(layout.S_FREE_SLOT, head)
    assert broken.table.take_free() == taken
    assert len(broken.log()) == bool(taken)


def test_formatting_moves_every_version_forward_around_the_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = bench.header(layout.S_STAMP)
    bench.watch(monkeypatch)
    bench.table.format_free()
    expected = [(bench.region.header + layout.S_STAMP, stamp + 2)]
    for slot in range(SLOTS):
        expected += [
            (bench.slot_at(slot, layout.E_VERSION), stamp + 1),
            (bench.slot_at(slot, layout.E_PLACE), 0),
            (bench.slot_at(slot, layout.E_CHAIN), slot + 2 if slot < SLOTS - 1 else 0),
            (bench.region.buckets + slot, 0),
            (bench.slot_at(slot, layout.E_VERSION), stamp + 2),
        ]
    assert bench.stores == [*expected, (bench.region.header + layout.S_FREE_SLOT, 1)]
