"""Situations to die in: a small cache, an operation on it, and the contents that a death in the operation may leave.

Parts of the suite differ in how they let a process die; what it left is judged here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from shmcache import Cache
from shmcache.engine import layout
from shmcache.engine.primitives import store
from tests.conftest import Clock
from tests.torture.campaign import Trial

# An entry as `contents` shows it: key, value, seconds to live.
Entry: TypeAlias = tuple[str, Any, float | None]
Contents: TypeAlias = list[Entry]
Operation: TypeAlias = Callable[[Cache], object]


# --- looking --------------------------------------------------------------------------------------------------------
def contents(cache: Cache) -> Contents:
    """Every entry, the most recently used first, read without changing anything."""
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    slot = words[region.header + layout.S_ORDER] & 0xFFFF_FFFF
    found: Contents = []
    while slot:
        [(key, value)], _ = cache._scan(slot - 1, 1, True)
        found.append((key, value, cache.info(key).ttl))
        slot = words[region.slots + (slot - 1) * layout.SLOT_WORDS + layout.E_ORDER] >> 32
        assert len(found) <= cache.max_entries
    return found


def without(entries: Contents, *keys: str) -> Contents:
    return [entry for entry in entries if entry[0] not in keys]


def promoted(entries: Contents, key: str) -> Contents:
    return [entry for entry in entries if entry[0] == key] + without(entries, key)


class Image:
    """The shard as it is now, to put it back as often as need be."""

    def __init__(self, cache: Cache) -> None:
        region = cache._attachment.geometry.region(0)
        self._part = cache._attachment.data[region.header * 8 : region.end * 8]
        self._bytes = bytes(self._part)

    def restore(self) -> None:
        self._part[:] = self._bytes

    def is_now(self) -> bool:
        return bool(self._part == self._bytes)


# --- a small cache --------------------------------------------------------------------------------------------------
SLOTS = 8


@dataclass
class Case:
    """An operation on the present contents, and the contents that a death in it may leave, the last being its end."""

    operation: Operation
    allowed: list[Contents]
    mend: Operation | None = None  # what has to be done after a death, where any operation will not do


def filling(length: int, mark: str = "x") -> str:
    """A value that takes this many adjacent blocks with a key of one letter."""
    return mark * (length * layout.BLOCK_BYTES - layout.RUN_HEADER_BYTES - 8)


def fill(cache: Cache, keys: str = "abcd") -> Contents:
    """Entries of one to three blocks, every other one with a time to live."""
    for number, key in enumerate(keys):
        cache.set(key, filling(number % 3 + 1, key), 60.0 + number if number % 2 else None)
    return contents(cache)


def first_block(cache: Cache, key: str) -> int:
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    slot = max(slot for slot in range(SLOTS) if cache._scan(slot, 1, False)[0][:1] == [(key, None)])
    return int(words[region.slots + slot * layout.SLOT_WORDS + layout.E_PLACE] & 0xFFFF_FFFF) - 1


def runs_of(cache: Cache, key: str) -> int:
    """How many pieces an entry lies in."""
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    run, count = first_block(cache, key) + 1, 0
    while run:
        run = words[region.blocks + (run - 1) * layout.BLOCK_WORDS] & 0xFFFF_FFFF
        count += 1
    return count


def in_pieces(cache: Cache, operation: Operation, key: str) -> bool:
    """Whether an operation would store an entry in several pieces; the cache is as before."""
    before = Image(cache)
    operation(cache)
    runs = runs_of(cache, key)
    before.restore()
    return runs > 1


def outcome(cache: Cache, operation: Operation) -> Contents:
    """What the whole operation comes to; the cache is as before."""
    before = Image(cache)
    operation(cache)
    after = contents(cache)
    before.restore()
    return after


def fragment(cache: Cache) -> Contents:
    """Leave free runs of one to four blocks between the entries, and no longer one."""
    rest = cache._attachment.geometry.blocks - 1 - 2 - 3 - 4 - 3 * 1
    for key, length in zip("1a2b3cz", (1, 1, 2, 1, 3, 1, rest + 4), strict=True):
        cache.set(key, filling(length, key))
    for key in "123":
        cache.delete(key)
    return contents(cache)


def small_cache(trial: Trial, clock: Clock) -> contextlib.AbstractContextManager[Cache]:
    return trial.cache(max_bytes=24 * 1024, max_entries=SLOTS, shards=1, clock=clock)


# --- after a death --------------------------------------------------------------------------------------------------
def mend(cache: Cache, case: Case) -> None:
    """Make this process the next one to have the lock."""
    if case.mend is None:
        cache.delete("no such key")
    else:
        case.mend(cache)


def judge(cache: Cache, case: Case, *, by_looking: bool, where: str) -> Contents:
    """What a death left, which has to be in order and allowed. This process perhaps looks first, without the lock."""
    looks = by_looking and case.mend is None
    if looks:
        for key in {key for entries in case.allowed for key, _, _ in entries}:
            possible = [{key: value for key, value, _ in entries}.get(key) for entries in case.allowed]
            assert cache.get(key) in possible, where
        assert cache.get("no such key") is None, where
    mend(cache, case)
    assert cache.check() == [], where
    after = contents(cache)
    if looks:  # which changed the order
        assert sorted(after) in [sorted(entries) for entries in case.allowed], where
    else:
        assert after in case.allowed, where
    return after


# --- the operations -------------------------------------------------------------------------------------------------
Make: TypeAlias = Callable[[Cache, Clock], Case]
CASES: dict[str, Make] = {}


def case(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES[name] = make
        return make

    return add


def insert(keys: str, ttl: float | None) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache, keys)
        return Case(lambda cache: cache.set("n", "new", ttl), [before, [("n", "new", ttl), *before]])

    return make


for _keys, _ttl in itertools.product(("", "abcd"), (None, 60.0)):
    CASES[f"insert into {len(_keys)}, ttl {_ttl}"] = insert(_keys, _ttl)


@case("insert where all slots are in use")
def evict(cache: Cache, clock: Clock) -> Case:
    before = fill(cache, "abcdefgh")
    evicted = without(before, "a")
    return Case(lambda cache: cache.set("n", "new"), [before, evicted, [("n", "new", None), *evicted]])


@case("insert that evicts several for their blocks")
def evict_several(cache: Cache, clock: Clock) -> Case:
    before = fill(cache, "abcdef")
    value = filling(cache._attachment.geometry.blocks - 4)
    steps = [before[:count] for count in range(len(before), 0, -1)]
    after = outcome(cache, lambda cache: cache.set("n", value))
    assert 1 < len(after) < len(before)
    allowed = [entries for entries in steps if len(entries) >= len(after) - 1]
    return Case(lambda cache: cache.set("n", value), [*allowed, after])


@case("insert into several runs")
def insert_in_pieces(cache: Cache, clock: Clock) -> Case:
    before = fragment(cache)
    value = filling(5, "n")
    assert in_pieces(cache, lambda cache: cache.set("n", value), "n")
    return Case(lambda cache: cache.set("n", value), [before, [("n", value, None), *before]])


@case("insert where limbo is no chain")
def give_up(cache: Cache, clock: Clock) -> Case:
    before = fill(cache, "abcd")
    attachment = cache._attachment
    store(attachment.words, attachment.geometry.region(0).header + layout.S_LIMBO, attachment.geometry.blocks + 1)
    return Case(lambda cache: cache.set("n", "new"), [before, [("n", "new", None), *before]])


@case("delete between free runs that others are between in their bin")
def delete_within_a_bin(cache: Cache, clock: Clock) -> Case:
    """What waits of e is freed first, so that the bin is e, c, a; then b, which takes c out of its midst, and a."""
    for key in "abcdefg":
        cache.set(key, filling(1, key))
    cache.delete_many([*"ace"])
    before = contents(cache)
    return Case(lambda cache: cache.delete_many([*"bf"]), [before, without(before, "b"), without(before, "b", "f")])


def overwrite(key: str, length: int, ttl: float | None) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache)
        value = filling(length, "o")
        after = [(key, value, ttl), *without(before, key)]
        return Case(lambda cache: cache.set(key, value, ttl), [before, promoted(before, key), after])

    return make


for _key, _length, _ttl in (("a", 1, None), ("a", 9, 5.0), ("b", 2, 5.0), ("b", 1, None), ("d", 9, None)):
    CASES[f"overwrite {_key} with {_length} blocks, ttl {_ttl}"] = overwrite(_key, _length, _ttl)


@case("overwrite into several runs")
def overwrite_in_pieces(cache: Cache, clock: Clock) -> Case:
    before = fragment(cache)
    value = filling(5, "o")
    assert in_pieces(cache, lambda cache: cache.set("b", value), "b")
    after = [("b", value, None), *without(before, "b")]
    return Case(lambda cache: cache.set("b", value), [before, promoted(before, "b"), after])


@case("overwrite of several runs")
def overwrite_pieces(cache: Cache, clock: Clock) -> Case:
    fragment(cache)
    cache.set("b", filling(5, "o"))
    assert runs_of(cache, "b") > 1
    before = contents(cache)
    return Case(lambda cache: cache.set("b", "short"), [before, [("b", "short", None), *without(before, "b")]])


def delete(keys: str, key: str) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache, keys)
        return Case(lambda cache: cache.delete(key), [before, without(before, key)])

    return make


for _keys, _key in (("a", "a"), ("abcdefgh", "a"), ("abcdefgh", "d"), ("abcdefgh", "h")):
    CASES[f"delete {_key} of {len(_keys)}"] = delete(_keys, _key)


@case("delete of several runs")
def delete_pieces(cache: Cache, clock: Clock) -> Case:
    fragment(cache)
    cache.set("n", filling(5, "n"))
    assert runs_of(cache, "n") > 1
    before = contents(cache)
    return Case(lambda cache: cache.delete("n"), [before, without(before, "n")])


def expire(operation: Operation) -> Make:
    """Only the child sees the time pass."""

    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache, "abcdef")

        def later(cache: Cache) -> None:
            clock.advance(100)
            operation(cache)

        expired = ["b", "d", "f"]
        allowed = [without(before, *some) for count in range(4) for some in itertools.combinations(expired, count)]
        return Case(later, allowed)

    return make


CASES["expiry by a write"] = expire(lambda cache: cache.delete("nothing"))
CASES["expiry by purge"] = expire(lambda cache: cache.purge())


def neighbours(cache: Cache, clock: Clock) -> Contents:
    """Three entries in one list of the timer wheel, expired, and one that is not: only the child sees the time pass."""
    for key in "abc":
        cache.set(key, filling(1, key), 60.0)
    cache.set("z", filling(1, "z"))
    return contents(cache)


@case("insert of a neighbour in time")
def insert_neighbour(cache: Cache, clock: Clock) -> Case:
    before = neighbours(cache, clock)
    return Case(lambda cache: cache.set("n", "new", 60.0), [before, [("n", "new", 60.0), *before]])


def delete_neighbour(key: str) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = neighbours(cache, clock)
        return Case(lambda cache: cache.delete(key), [before, without(before, key)])

    return make


for _key in "abc":
    CASES[f"delete of neighbour {_key} in time"] = delete_neighbour(_key)


@case("dealing out of what is not due yet")
def deal_out(cache: Cache, clock: Clock) -> Case:
    """The hand comes to a block of the wheel with more entries than one write looks at, and none of them is due."""
    block = 1 << layout.WHEEL_BITS
    clock.now = (clock.now // (block << layout.WHEEL_SHIFT) + 1) * (block << layout.WHEEL_SHIFT)
    cache.delete("nothing")
    for key in "abcdef":
        cache.set(key, filling(1, key), 60.0)
    before = contents(cache)

    def later(cache: Cache) -> None:
        clock.now += block << layout.WHEEL_SHIFT
        cache.delete("nothing")

    return Case(later, [before])


@case("delete between free runs of the same length")
def delete_between(cache: Cache, clock: Clock) -> Case:
    for key in "abcdefg":
        cache.set(key, filling(1, key))
    for key in "fdb":
        cache.delete(key)
    before = contents(cache)
    return Case(lambda cache: cache.delete("c"), [before, without(before, "c")])


@case("overwrite of an expired entry")
def overwrite_expired(cache: Cache, clock: Clock) -> Case:
    before = fill(cache, "ab")

    def later(cache: Cache) -> None:
        clock.advance(100)
        cache.set("b", "new", None)

    return Case(later, [before, without(before, "b"), [("b", "new", None), *without(before, "b")]])


@case("incr")
def incr(cache: Cache, clock: Clock) -> Case:
    cache.set("i", 41, 60.0)
    before = fill(cache, "abc")
    after = [("i", 42, 60.0), *without(before, "i")]
    return Case(lambda cache: cache.incr("i"), [before, promoted(before, "i"), after])


@case("incr of a missing key")
def incr_missing(cache: Cache, clock: Clock) -> Case:
    before = fill(cache)
    return Case(lambda cache: cache.incr("i", initial=0, ttl=5.0), [before, [("i", 1, 5.0), *before]])


def touch(key: str, ttl: float | None) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache)
        after = [(key, value, ttl) for each, value, _ in before if each == key] + without(before, key)
        return Case(lambda cache: cache.touch(key, ttl), [before, after])

    return make


for _key, _ttl in (("a", 5.0), ("b", None), ("b", 5.0), ("d", None)):
    CASES[f"touch {_key}, ttl {_ttl}"] = touch(_key, _ttl)


def hit(key: str) -> Make:
    def make(cache: Cache, clock: Clock) -> Case:
        before = fill(cache)
        return Case(lambda cache: cache.get(key), [before, promoted(before, key)])

    return make


for _key in "abd":
    CASES[f"get {_key}"] = hit(_key)


@case("clear")
def clear(cache: Cache, clock: Clock) -> Case:
    return Case(lambda cache: cache.clear(), [fill(cache), []])


@case("set_many")
def set_many(cache: Cache, clock: Clock) -> Case:
    before = fill(cache)
    first: Contents = [("n", "new", None), *before]
    second: Contents = [("b", "other", None), *without(first, "b")]
    third: Contents = [("m", "more", None), *second]
    return Case(
        lambda cache: cache.set_many({"n": "new", "b": "other", "m": "more"}),
        [before, first, promoted(first, "b"), second, third],
    )


@case("batch")
def batch(cache: Cache, clock: Clock) -> Case:
    cache.set("i", 1)
    fill(cache)
    before = contents(cache)

    def operation(cache: Cache) -> None:
        with cache.batch() as batch:
            batch.delete("b")
            batch.touch("a", 7.0)
            batch.incr("i", 2)

    first = without(before, "b")
    second: Contents = [("a", filling(1, "a"), 7.0), *without(first, "a")]
    third: Contents = [("i", 3, None), *without(second, "i")]
    return Case(operation, [before, first, second, promoted(second, "i"), third])


@case("repair of a sound shard")
def repair_sound(cache: Cache, clock: Clock) -> Case:
    return Case(lambda cache: cache.repair(), [fill(cache)])


@case("repair of a broken shard")
def repair_broken(cache: Cache, clock: Clock) -> Case:
    """The buckets, the eviction order and a key's bytes are overwritten; all but that entry can be proved."""
    before = fill(cache)
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    words[region.blocks + first_block(cache, "b") * layout.BLOCK_WORDS + 1] ^= 0xFF
    for slot in range(SLOTS):
        words[region.buckets + slot] = 0
    words[region.header + layout.S_ORDER] = 0
    assert cache.check() != []
    return Case(lambda cache: cache.repair(), [without(before, "b")], mend=lambda cache: cache.repair())


@case("repair of wrong versions")
def repair_versions(cache: Cache, clock: Clock) -> Case:
    """One version is odd, and the source of new ones has fallen behind them all."""
    before = fill(cache)
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    words[region.header + layout.S_STAMP] = 2
    words[region.slots + layout.E_VERSION] |= 1
    return Case(lambda cache: cache.repair(), [before], mend=lambda cache: cache.repair())


@case("recovery where limbo is no chain")
def limbo_broken(cache: Cache, clock: Clock) -> Case:
    before = fill(cache)
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    words[region.header + layout.S_LIMBO] = 1 << 30
    return Case(lambda cache: cache.delete("nothing"), [before])
