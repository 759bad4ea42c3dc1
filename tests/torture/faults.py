"""A death before every single store of every kind of operation: the entries are as before it, or as after it.

This is about the order of the stores, which is the same compiled and uncompiled, so it runs on the sources, where each
store can be made the last one of a process: a forked child counts its stores and kills itself before number 1, then
another child before number 2, and so on until a child survives. Whatever it left is then picked up by this process.
Each place in the engine's source that stores something has to have been such a last one: `unreached` names those that
were not.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from shmcache import Cache, engine
from shmcache.engine import layout, lock, primitives
from shmcache.semaphore import Sleeper
from tests.conftest import Clock
from tests.processes import Child, no_gc
from tests.torture.campaign import Part, Trial

# An entry as `contents` shows it: key, value, seconds to live.
Entry: TypeAlias = tuple[str, Any, float | None]
Contents: TypeAlias = list[Entry]
Operation: TypeAlias = Callable[[Cache], object]


# --- dying at a store -----------------------------------------------------------------------------------------------
STORES = {"store", "store_release", "logged_store", "compare_and_swap", "store_seq_cst", "copy_in"}
ENGINE = Path(engine.__file__).parent

# Stores outside of any critical section, or that no death can come between.
ELSEWHERE = {
    "membership.Member.count": "a statistic in this process's own line",
    "membership.Registry.take_line": "under the setup lock: tests/test_processes.py kills a creator at each of them",
    "membership.Registry.leave": "the last store of a process that detaches",
    "shard.Shard.format": "at creation, before anybody can attach",
}

_label = memoryview(mmap.mmap(-1, 4096))  # where the child that dies next says where


def arm(last: int) -> None:
    """Make this process die before its store number `last`, and in the midst of copying bytes."""
    steps = 0
    # A wake-up that an earlier death left in the semaphore would give the stores other numbers.
    setattr(Sleeper, "sleep", lambda sleeper: False)  # noqa: B010

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            name = place().encode()
            _label[: len(name) + 1] = name + b"\0"
            os.kill(os.getpid(), signal.SIGKILL)

    real_store, real_copy_in = primitives.store, primitives.copy_in

    def store(words: memoryview, index: int, value: int) -> None:
        step()
        real_store(words, index, value)

    def copy_in(data: memoryview, at: int, source: bytes, size: int) -> bool:
        step()
        if size:
            real_copy_in(data, at, source, size // 2 + 1)
        step()
        return real_copy_in(data, at, source, size)

    # `logged_store` and `compare_and_swap` call the `store` of their module, so each of theirs counts too.
    stand_ins = {"store": store, "store_release": store, "store_seq_cst": store, "copy_in": copy_in}
    for path, module in list(sys.modules.items()):
        if path.startswith("shmcache.engine."):
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    setattr(module, name, stand_in)


def place() -> str:
    """Which store of the engine's source is being made now: `module.function:line`."""
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).parent != ENGINE or frame.f_globals["__name__"].endswith(".primitives"):
        assert frame.f_back is not None
        frame = frame.f_back
    module = frame.f_globals["__name__"].rpartition(".")[2]
    return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}"


def places() -> dict[str, range]:
    """Every place in the engine's source that stores something: its name and lines."""
    found: dict[str, range] = {}

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                walk(child, f"{owner}.{child.name}")
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in STORES:
                assert child.end_lineno is not None
                found[f"{owner}:{child.lineno}"] = range(child.lineno, child.end_lineno + 1)
            walk(child, owner)

    for path in sorted(ENGINE.glob("*.py")):
        if path.stem != "primitives":
            walk(ast.parse(path.read_text()), path.stem)
    return {name: lines for name, lines in found.items() if name.partition(":")[0] not in ELSEWHERE}


def unreached(reached: set[str]) -> list[str]:
    """The places where no process died."""
    lines: dict[str, set[int]] = {}
    for each in reached:
        owner, _, line = each.partition(":")
        lines.setdefault(owner, set()).add(int(line))
    return [name for name, span in places().items() if not lines.get(name.partition(":")[0], set()).intersection(span)]


def dies(cache: Cache, operation: Operation, last: int) -> str | None:
    """Perform an operation in a child that dies before its store number `last`; where, or None if it did not."""

    def work() -> None:
        cache._check_open()  # take a place in the process table before the stores count
        arm(last)
        operation(cache)

    code = Child(work).wait()
    assert code in (0, -signal.SIGKILL), "the operation failed: see its traceback above"
    return bytes(_label).partition(b"\0")[0].decode() if code else None


# --- looking --------------------------------------------------------------------------------------------------------
def contents(cache: Cache) -> Contents:
    """Every entry, the most recently used first, read without changing anything."""
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
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
        region = cache.attachment.geometry.region(0)
        self._part = cache.attachment.data[region.header * 8 : region.end * 8]
        self._bytes = bytes(self._part)

    def restore(self) -> None:
        self._part[:] = self._bytes


def crash(cache: Cache, case: Case, last: int, before: Image) -> str | None:
    """Let the operation die before its store number `last`, and look; where it died, or None if it did not.

    This process looks without the lock first, or performs an operation at once, in turn; then all must be well, and the
    contents one of those allowed, the last of which is what the whole operation comes to.
    """
    before.restore()
    died = dies(cache, case.operation, last)
    where = f"dead before store {last}, {died}"
    looks = died is not None and case.mend is None and last % 2 == 0
    if looks:
        for key in {key for entries in case.allowed for key, _, _ in entries}:
            possible = [{key: value for key, value, _ in entries}.get(key) for entries in case.allowed]
            assert cache.get(key) in possible, where
        assert cache.get("no such key") is None, where
    if case.mend is None:
        cache.delete("no such key")
    else:
        case.mend(cache)
    assert cache.check() == [], where
    after = contents(cache)
    if looks:  # which changed the order
        assert sorted(after) in [sorted(entries) for entries in case.allowed], where
    else:
        assert after in case.allowed, where
    if died is None:
        assert after == case.allowed[-1]
    return died


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
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    slot = max(slot for slot in range(SLOTS) if cache._scan(slot, 1, False)[0][:1] == [(key, None)])
    return int(words[region.slots + slot * layout.SLOT_WORDS + layout.E_PLACE] & 0xFFFF_FFFF) - 1


def runs_of(cache: Cache, key: str) -> int:
    """How many pieces an entry lies in."""
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
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
    rest = cache.attachment.geometry.blocks - 1 - 2 - 3 - 4 - 3 * 1
    for key, length in zip("1a2b3cz", (1, 1, 2, 1, 3, 1, rest + 4), strict=True):
        cache.set(key, filling(length, key))
    for key in "123":
        cache.delete(key)
    return contents(cache)


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
    value = filling(cache.attachment.geometry.blocks - 4)
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
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
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
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    words[region.header + layout.S_STAMP] = 2
    words[region.slots + layout.E_VERSION] |= 1
    return Case(lambda cache: cache.repair(), [before], mend=lambda cache: cache.repair())


@case("recovery where limbo is no chain")
def limbo_broken(cache: Cache, clock: Clock) -> Case:
    before = fill(cache)
    words, region = cache.attachment.words, cache.attachment.geometry.region(0)
    words[region.header + layout.S_LIMBO] = 1 << 30
    return Case(lambda cache: cache.delete("nothing"), [before])


def recovery(of: str, share: float) -> Make:
    """The recovery from a death within another case, about `share` of its way through."""

    def make(cache: Cache, clock: Clock) -> Case:
        dead = CASES[of](cache, clock)
        before = Image(cache)
        stores = 0
        while True:
            before.restore()
            if dies(cache, dead.operation, stores + 1) is None:
                break
            stores += 1
        before.restore()
        assert dies(cache, dead.operation, 1 + round(share * (stores - 1))) is not None
        left = Image(cache)
        cache.delete("no such key")
        comes_to = contents(cache)
        assert comes_to in dead.allowed
        left.restore()
        return Case(lambda cache: cache.delete("no such key"), [comes_to])

    return make


for _name in (
    "insert into several runs",
    "overwrite b with 2 blocks, ttl 5.0",
    "insert where all slots are in use",
    "delete d of 8",
    "clear",
    "repair of a sound shard",
):
    for _fifth in range(6):
        CASES[f"recovery from death in: {_name} ({_fifth}/5)"] = recovery(_name, _fifth / 5)


# --- the part -------------------------------------------------------------------------------------------------------
def small_cache(trial: Trial, clock: Clock) -> contextlib.AbstractContextManager[Cache]:
    return trial.cache(max_bytes=24 * 1024, max_entries=SLOTS, shards=1, clock=clock)


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one death. When not all of them can be had, every so manieth store, beginning anywhere."""
    lock.PROBE_NS = 0  # ask the kernel about a silent owner at once: there are thousands of them
    # An odd number, so that both ways of looking at what a death left are taken.
    stride = 1 if trial.goal is None else DEATHS // trial.goal | 1
    reached: set[str] = set()
    names = list(CASES)
    trial.rng.shuffle(names)
    with no_gc():
        for name in names:
            clock = Clock()
            with small_cache(trial, clock) as cache:
                case = CASES[name](cache, clock)
                before = Image(cache)
                for last in itertools.count(trial.rng.randint(1, stride), stride):
                    died = crash(cache, case, last, before)
                    if died is None:
                        break
                    reached.add(died)
                    trial.count("deaths")
                    yield
                before.restore()
                cache.repair()
            trial.count("operations")
    missed = unreached(reached)
    trial.count("places in the source", len(places()))
    trial.count("places reached", len(places()) - len(missed))
    assert stride > 1 or not missed, f"no process died at {missed}"


DEATHS = 11_000  # about as many as there are

PART = Part(
    claim="a process that dies before any store of any operation leaves the entries as before it or as after it",
    rounds=rounds,
    short=3_700,
    on_sources=True,
)
