"""A segment that lies: any of its bytes overwritten, before operations and meanwhile, costs entries at most.

Whatever the segment holds, an operation gives a value, a miss or a ShmcacheError, in time, and touches no shared memory
but the segment: here that lies between pages nobody may touch. `repair()` then makes the cache whole, or attaching is
refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import numpy

from shmcache import Cache, CorruptSegment, IncompatibleSegment, LockTimeout, ShmcacheError, attachment, is_compiled
from shmcache.engine import layout
from tests.processes import Child, Family, no_gc
from tests.torture.campaign import Part, Trial

COMPILED = is_compiled()
ROUNDS = 250 if COMPILED else 30  # of damage, operations and repair; one child's work
OPERATIONS = 12 if COMPILED else 6  # of a round
EPOCH = 0.15  # seconds of damage at full speed
LONGEST = 20.0  # seconds that one operation may take, on a machine with other things to do
GROWTH = 64 * 1024  # KiB that a child may grow by
LOCK_TIMEOUT = 0.03  # seconds
GUARD = 1 << 30  # bytes of forbidden memory on either side
GONE = object()
CACHES: tuple[dict[str, Any], ...] = (
    {"max_bytes": "128KB", "max_entries": 50, "shards": 1},
    {"max_bytes": "256KB", "max_entries": 80, "shards": 4},
)


# --- forbidden memory on either side --------------------------------------------------------------------------------
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_guarded: dict[tuple[int, int], memoryview] = {}


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    got: int = _libc.mmap(address, size, protection, flags, fd, 0)
    if got == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return got


def map_guarded(fd: int, size: int) -> memoryview:
    """What `mmap.mmap(fd, size)` gives, but one byte before or behind it is a SIGSEGV. Mapped once in a process."""
    status = os.fstat(fd)
    file = (status.st_dev, status.st_ino)
    if file not in _guarded:
        private = 0x02 | 0x20 | 0x4000  # MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
        start = _map(None, size + 2 * GUARD, 0, private, -1)
        at = _map(start + GUARD, size, mmap.PROT_READ | mmap.PROT_WRITE, 0x01 | 0x10, fd)  # MAP_SHARED, MAP_FIXED
        _guarded[file] = _view(at, size, 0x200)  # PyBUF_WRITE
    return _guarded[file]


# --- lies -----------------------------------------------------------------------------------------------------------
class Liar:
    """Overwrites words of a segment: random ones, and those that mean something with what is worst for them.

    `count` is the number of words and of stretches of bytes overwritten. Lies of the kinds in `LINKS` leave all that an
    entry consists of alone, so that after these no value may be wrong.
    """

    LINKS = ("heads", "bins", "wheel", "buckets", "slot links", "waiters")
    KINDS = (*LINKS, "anywhere", "bytes", "header", "processes", "shard", "log", "slots", "runs", "values", "lock")
    HEADS = (
        *(layout.S_ORDER, layout.S_FREE_SLOT, layout.S_ENTRIES, layout.S_FREE_BLOCKS, layout.S_USED_BYTES),
        *(layout.S_HAND, layout.S_TICK, layout.S_EVICTIONS, layout.S_PEAK_ENTRIES, layout.S_SUBJECT, layout.S_SEQUENCE),
    )

    def __init__(self, cache: Cache, rng: random.Random, live: int) -> None:
        self.words: memoryview = cache._attachment.words
        self.data: memoryview = cache._attachment.data
        self.geometry = cache._attachment.geometry
        self.rng = rng
        self.live = live
        self.count = 0
        self.before: list[tuple[int, int | bytes]] = []
        self.gave_lock = False  # to a live process

    def lie(self, kind: str) -> None:
        """Overwrite something of this kind."""
        rng, words, region = self.rng, self.words, self.geometry.region(self.rng.randrange(self.geometry.shards))
        slots, blocks = self.geometry.slots, self.geometry.blocks
        slot, block = rng.randrange(slots), rng.randrange(blocks)
        match kind:
            case "anywhere":
                at = rng.randrange(len(words))
                self.gave_lock = True  # it may have hit a lock, or a line of the process table
                self.put(at, self.word(at, at, len(words)))
            case "bytes":
                start, size = rng.randrange(len(self.data)), rng.choice((1, 2, 8, 64, 4096))
                some = rng.randbytes(size)[: len(self.data) - start]
                self.gave_lock = True
                self.write(start, some)
            case "header":
                at = rng.randrange(layout.HEADER_WORDS)
                self.put(at, self.word(at, at, len(words)))
            case "processes":
                line = rng.randrange(4)
                at = layout.HEADER_WORDS + line * layout.PROCESS_WORDS + rng.randrange(layout.PROCESS_WORDS)
                self.gave_lock = True
                self.put(at, self.word(at, line, self.geometry.processes))
            case "lock":
                owner = rng.choice(
                    (self.live, rng.getrandbits(64), 1, 1 << 63, layout.MAX_PROCESSES << 48 | 1, 7 << 48)
                )
                self.gave_lock |= owner == self.live
                self.put(region.header + layout.S_LOCK, owner)
            case "waiters":
                at = region.header + layout.S_WAITERS
                self.put(at, rng.choice((1, 5, 1 << 32, (1 << 64) - 1)))
            case "heads":
                at = region.header + rng.choice(self.HEADS)
                self.put(at, self.word(at, slot, rng.choice((slots, blocks))))
            case "shard":
                at = region.header + rng.randrange(1, layout.SHARD_WORDS)
                self.put(at, self.word(at, slot, slots))
            case "log":
                at = region.log + rng.choice((0, 0, rng.randrange(1 + 2 * layout.LOG_ENTRIES)))
                value = rng.choice((rng.randrange(1, 2 * layout.LOG_ENTRIES), rng.randrange(region.header, region.end)))
                self.put(at, rng.choice((value, self.word(at, at, len(words)))))
            case "bins":
                at = region.bins + rng.randrange(layout.BIN_BITMAP_WORDS + layout.BINS)
                self.put(at, rng.choice((1 << rng.randrange(64), self.word(at, block, blocks))))
            case "wheel":
                at = region.wheel + rng.randrange(layout.WHEEL_LISTS)
                self.put(at, self.word(at, slot, slots))
            case "buckets":
                at = region.buckets + rng.randrange(slots)
                # With the tag that is there, or a reader would look no further.
                low = self.half(slot, slots)
                self.put(at, rng.choice((words[at] >> 32 << 32 | low, self.word(at, slot, slots))))
            case "slot links":
                at = region.slots + slot * layout.SLOT_WORDS + rng.choice((5, 6, 7))
                low = self.half(slot, slots)
                self.put(at, rng.choice((words[at] >> 32 << 32 | low, self.word(at, slot, slots))))
            case "slots":
                at = region.slots + slot * layout.SLOT_WORDS + rng.randrange(5)
                self.put(at, self.word(at, block, rng.choice((blocks, slots))))
            case "runs":
                at = region.blocks + block * layout.BLOCK_WORDS + rng.choice((0, 0, 1, 7))
                self.put(at, self.word(at, block, blocks))
            case "values":
                self.value(region, slot)

    # Never that the cache is ephemeral: nobody can tell that it is not, and who detaches would remove it, as it should.
    def write(self, start: int, some: bytes | bytearray) -> None:
        flags = layout.H_FLAGS * 8 + (0 if sys.byteorder == "little" else 7)
        if start <= flags < start + len(some):
            some = bytearray(some)
            some[flags - start] &= ~layout.FLAG_EPHEMERAL
        self.before.append((start, bytes(self.data[start : start + len(some)])))
        self.data[start : start + len(some)] = some
        self.count += 1

    def put(self, at: int, value: int) -> None:
        if at == layout.H_FLAGS:
            value &= ~layout.FLAG_EPHEMERAL
        self.before.append((at, self.words[at]))  # a word is stored whole, as a process would
        self.words[at] = value
        self.count += 1

    def take_back(self) -> None:
        """Undo all lies since the last time."""
        for at, old in reversed(self.before):
            if isinstance(old, int):
                self.words[at] = old
            else:
                self.data[at : at + len(old)] = old
        self.before.clear()

    def half(self, own: int, count: int) -> int:
        """Half a word where a number + 1 below `count` should be, in a place that belongs to number `own`."""
        rng = self.rng
        near = (own, own + 1, own + 2, 0, 1, count, count + 1, count + 2, 1 << 31, (1 << 32) - 1, rng.getrandbits(32))
        return rng.choice((rng.choice(near), rng.randrange(count + 1)))

    def word(self, at: int, own: int, count: int) -> int:
        """A lie for the word `at`."""
        rng = self.rng
        old = self.words[at]
        match rng.randrange(8):
            case 0:
                return rng.choice((0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 32) - 1, at, count, count + 1))
            case 1:
                return rng.getrandbits(64)
            case 2:
                return old ^ 1 << rng.randrange(64)
            case 3:
                return (old + rng.choice((-2, -1, 1, 2))) % (1 << 64)
            case 4:  # what a neighbour has ties two lists into one
                return self.words[(at + rng.choice((-8, -1, 1, 8))) % len(self.words)]
            case 5:
                return old >> 32 << 32 | self.half(own, count)
            case 6:
                return self.half(own, count) << 32 | old % (1 << 32)
            case _:
                return self.half(own, count) << 32 | self.half(own, count)

    def value(self, region: layout.Region, slot: int) -> None:
        """Replace the value of an entry by hostile msgpack."""
        at = region.slots + slot * layout.SLOT_WORDS
        run = self.words[at + layout.E_PLACE] % (1 << 32)
        sizes = self.words[at + layout.E_SIZES]
        if 0 < run <= self.geometry.blocks:
            key_size = sizes >> 32 & 0xFFFF
            start = (region.blocks + (run - 1) * layout.BLOCK_WORDS) * 8 + layout.RUN_HEADER_BYTES + key_size
            some = hostile_message(self.rng)
            room = max(0, region.end * 8 - start)
            some = some[:room]
            self.write(start, some)
            self.put(at + layout.E_SIZES, sizes >> 32 << 32 | len(some))


def extension(code: int, payload: bytes) -> bytes:
    return struct.pack(">BIb", 0xC9, len(payload), code) + payload


def hostile_message(rng: random.Random) -> bytes:
    """Bytes that a msgpack decoder would rather not see."""
    deep = rng.choice((1, 63, 64, 65, 500, 1023, 1024, 1025, 3000))
    many = rng.choice((0, 1, 1 << 31, (1 << 32) - 1)).to_bytes(4, "big")
    some = rng.randbytes(rng.choice((0, 1, 2, 8, 16, 40)))
    match rng.randrange(12):
        case 0:
            return rng.choice((b"\x91", b"\x81\xc0", b"\x81")) * deep + b"\xc0"
        case 1:
            return rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + many + some
        case 2:
            return b"\xc9" + many + rng.randbytes(1) + some
        case 3:
            return rng.choice((b"\xdc\xff\xff", b"\xdd\x00\x00\x0f\xff")) * rng.choice((1, 100, 1024))
        case 4:
            message = some
            for _ in range(min(deep, 70)):
                message = extension(rng.choice((1, 1, 1, 2, 3)), b"\x91" + message)
            return message
        case 5:
            return extension(rng.randrange(-128, 128), some)
        case 6:
            text = rng.choice((b"\xa4\xff\xfe\xfd\xfc", b"\xa2\xc0\x80", b"\xa3\xed\xa0\x80", b"\xd9\x02\xff\xff"))
            return rng.choice((text, b"\x92" + text + text, b"\x81" + text + b"\xc0"))
        case 7:
            numbers = [rng.choice((0, 1, -1, 13, 61, 10**9, 1 << 62, None, "x", 1.5)) for _ in range(8)]
            zone = rng.choice(("../../etc/passwd", "", "\0", "x" * 300, "Europe", [1 << 62, None], [1, 5], [], None, 7))
            size = rng.choice((3, 5, 8))
            return extension(rng.choice((9, 10, 11, 12)), msgpack.packb([*numbers[:size], zone]))
        case 8:
            kinds = (
                "<f8",
                "|S0",
                "|V0",
                "<U0",
                "|V4294967295",
                "|O",
                "<M8[as]",
                "<m8[0s]",
                [["a", "<i4"], ["a", "<i4"]],
            )
            kind = rng.choice((*kinds, [["a", "|V1", [1 << 31, 1 << 31]]], None, 7, _nested(rng.choice((3, 60, 400)))))
            shapes: tuple[Any, ...] = (
                [1 << 62],
                [1 << 32, 1 << 32],
                [0, 1 << 63],
                [-1],
                [1] * 40,
                [1] * 65,
                ["x"],
                [True],
                None,
                5,
                [],
            )
            shape = rng.choice((*shapes, [(1 << 64) - 1] * 300, [0] * 64))
            header = msgpack.packb([kind, rng.choice(("C", "F", "Q", None)), shape])
            size = rng.choice((len(header), len(header), 0, 1, 1 << 31))
            return extension(rng.choice((13, 14)), size.to_bytes(4, "big") + header + some)
        case 9:
            return rng.choice((extension(32, b"cos\nsystem\n(S'false'\ntR."), extension(33, some)))
        case 10:
            return extension(
                rng.choice((5, 6, 7, 8)), rng.choice((some, b"NaN" * 9, b"1e999999999999999999", b"9" * 5000))
            )
        case _:
            return rng.choice((b"", bytes([rng.choice((0xC1, *range(0xC4, 0xE0)))]) + some))


def _nested(depth: int) -> Any:
    return [["a", _nested(depth - 1)]] if depth else "<i4"


# --- who uses the cache ---------------------------------------------------------------------------------------------
class Board:
    """Memory in which a child says what it does: which operation it is at, since when, and how much it has done."""

    AT, SINCE, ROUNDS, LIES = range(4)

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)
        self.words = memoryview(self.memory).cast("Q")

    def begin(self, what: str) -> None:
        text = what.encode()[:500]
        self.memory[1024 : 1024 + len(text) + 1] = text + b"\0"
        self.words[self.AT] += 1
        self.words[self.SINCE] = time.monotonic_ns()

    def doing(self) -> str:
        return self.memory[1024:].partition(b"\0")[0].decode(errors="replace")


class Clock:
    """A clock in ns that the user turns."""

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def monotonic() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def some_value(rng: random.Random, number: int) -> Any:
    """A value of any kind, small or of many blocks."""
    match rng.randrange(12):
        case 0:
            return number
        case 1:
            return number + 0.5
        case 2:
            return None
        case 3:
            return f"{number}:" * rng.randrange(1, 900)
        case 4:
            return number.to_bytes(8, "big") * rng.randrange(1, 500)
        case 5:
            return {"number": number, "list": [number] * rng.randrange(9), "of": {"none": None}}
        case 6:
            return (number, "tuple", (number,))
        case 7:
            return frozenset((number, "set"))
        case 8:
            return datetime.fromtimestamp(number, UTC)
        case 9:
            return numpy.arange(number, number + 20)
        case 10:
            return number << 70
        case _:
            return f"value {number}"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, numpy.ndarray):
        return isinstance(other, numpy.ndarray) and bool(numpy.array_equal(one, other))
    return type(one) is type(other) and bool(one == other)


class User:
    """Uses a cache in every way there is, and knows which values a key has had.

    A key may be missing, or have an earlier value again, where a lie has cut the way to it. `strict` says that it may
    have no value but those.
    """

    def __init__(self, cache: Cache, rng: random.Random, board: Board, clock: Clock) -> None:
        self.cache = cache
        self.rng = rng
        self.board = board
        self.clock = clock
        self.strict = True
        self.number = 0
        self.has_had: dict[Any, list[Any]] = {}
        self.ways: tuple[Callable[[], object], ...] = (
            *(self.get, self.get, self.get, self.set, self.set, self.set, self.get_many, self.set_many, self.delete),
            *(self.delete_many, self.incr, self.touch, self.ttl, self.pop, self.add, self.replace, self.cas),
            *(self.batch, self.keys, self.items, self.info, self.stats, self.length, self.purge, self.memoized),
            *(self.contains, self.get_or_set, self.check, self.repair, self.clear, self.later),
        )

    def key(self) -> Any:
        number = self.rng.randrange(60)
        return (f"key {number}", number, ("tuple", number), str(number).encode() * 9)[number % 4]

    def knows(self, key: Any, found: Any) -> None:
        if self.strict and found is not GONE:
            assert any(same(found, each) for each in self.has_had.get(key, [])), (
                f"{key!r} is {found!r:.200}, expected one of {self.has_had.get(key)!r:.500}"
            )

    def stores(self, key: Any) -> Any:
        """A new value that the key may have from now on."""
        self.number += 1
        value = some_value(self.rng, self.number)
        self.has_had.setdefault(key, []).append(value)
        return value

    def some_ttl(self) -> Any:
        return self.rng.choice((None, 1, 30, 5000))

    def act(self) -> bool:
        """Do one thing; False for a LockTimeout."""
        way = self.rng.choice(self.ways)
        self.board.begin(way.__name__)
        try:
            way()
        except LockTimeout:
            return False
        except ShmcacheError:
            pass
        return True

    # --- the ways ---------------------------------------------------------------------------------------------------
    def get(self) -> None:
        key = self.key()
        self.knows(key, self.cache.get(key, GONE))

    def set(self) -> None:
        key = self.key()
        self.cache.set(key, self.stores(key), self.some_ttl())

    def get_many(self) -> None:
        for key, value in self.cache.get_many([self.key() for _ in range(5)]).items():
            self.knows(key, value)

    def set_many(self) -> None:
        keys = {self.key() for _ in range(5)}
        self.cache.set_many({key: self.stores(key) for key in keys}, self.some_ttl())

    def delete(self) -> None:
        self.cache.delete(self.key())

    def delete_many(self) -> None:
        self.cache.delete_many([self.key() for _ in range(5)])

    def incr(self) -> None:
        key = self.key()
        # Noted before, as everywhere: it may be stored though the operation raises afterwards.
        numbers = {each for each in self.has_had.get(key, []) if type(each) is int}
        self.has_had.setdefault(key, []).extend({each + 3 for each in (4, *numbers)} - numbers)
        # What it finds may be somebody's number, or no number at all, or nothing.
        with contextlib.suppress(KeyError, TypeError, OverflowError):
            self.cache.incr(key, 3, initial=self.rng.choice((None, 4)))

    def touch(self) -> None:
        self.cache.touch(self.key(), self.some_ttl())

    def ttl(self) -> None:
        with contextlib.suppress(KeyError):
            self.cache.ttl(self.key())

    def pop(self) -> None:
        key = self.key()
        self.knows(key, self.cache.pop(key, GONE))

    def add(self) -> None:
        key = self.key()
        self.cache.add(key, self.stores(key), self.some_ttl())

    def replace(self) -> None:
        key = self.key()
        self.cache.replace(key, self.stores(key), self.some_ttl())

    def cas(self) -> None:
        key = self.key()
        found, version = self.cache.gets(key, GONE)
        self.knows(key, found)
        self.cache.cas(key, self.stores(key), version)

    def batch(self) -> None:
        key, other = self.key(), self.key()
        with self.cache.batch() as batch:
            batch.set(key, self.stores(key))
            batch.delete(other)
            got = batch.get(key, GONE)
            batch.touch(other)
            batch.incr("batch", 1, 1)
        self.knows(key, got.value)

    def keys(self) -> None:
        for _ in self.cache:
            pass

    def items(self) -> None:
        for key, value in self.cache.items():
            if self.strict and key in self.has_had:
                self.knows(key, value)

    def info(self) -> None:
        with contextlib.suppress(KeyError):
            self.cache.info(self.key())

    def stats(self) -> None:
        self.cache.stats().as_dict()

    def length(self) -> None:
        assert len(self.cache) >= 0

    def purge(self) -> None:
        self.cache.purge()

    def memoized(self) -> None:
        function = self.cache.memoize(name="hostile")(lambda number: [number])
        self.board.begin("memoize")
        answer = function(self.number)
        assert not self.strict or answer == [self.number]
        function.cache_info()

    def contains(self) -> None:
        _ = self.key() in self.cache

    def get_or_set(self) -> None:
        key = self.key()
        value = self.stores(key)
        self.knows(key, self.cache.get_or_set(key, lambda: value))

    def check(self) -> None:
        self.cache.check()

    def repair(self) -> None:
        if self.rng.randrange(5) == 0:
            self.cache.repair()

    def clear(self) -> None:
        if self.rng.randrange(20) == 0:
            self.cache.clear()

    def later(self) -> None:
        self.clock.now += self.rng.choice((0, 10**6, 10**9, 10**11, 10**13))

    # --- afterwards -------------------------------------------------------------------------------------------------
    def demand_order(self) -> None:
        """`repair()` must do, and the cache work as a new one."""
        self.board.begin("repair, afterwards")
        self.cache.repair()
        assert self.cache.check() == [], "repair() left something"
        for number in range(8):  # some for each shard
            self.board.begin("set and get, afterwards")
            self.cache.set(("after", number), number, 10)
            assert self.cache.get(("after", number)) == number
            assert self.cache.info(("after", number)).ttl == 10
        self.clock.now += 11 * 10**9
        self.board.begin("purge, afterwards")
        before = self.cache.stats().entries
        assert len(self.cache) <= before - 8, "what has expired was not purged"
        assert self.cache.check() == [], "not whole after use"


# --- damage before operations ---------------------------------------------------------------------------------------
def fill(cache: Cache, user: User) -> None:
    for _ in range(70):
        key = user.key()
        cache.set(key, user.stores(key), user.some_ttl())
    for _ in range(20):
        cache.delete(user.key())


def owner_of(cache: Cache) -> int:
    """The id that a lock which this process holds would have."""
    line = cache._attachment.registry.own_line
    return int(line << 48 | cache._attachment.words[cache._attachment.registry.line(line)])


class Siege:
    """Many rounds of damage, use and repair by one child, which alone uses the cache but for a process that sleeps."""

    def __init__(self, name: str, live: int, seed: str, board: Board) -> None:
        prepare()
        self.board = board
        self.rng = random.Random(seed)
        self.seed = seed
        self.clock = Clock(10**15)
        self.name = name
        self.kinds: tuple[str, ...] = ()
        self.cache = self.attach()
        self.user = User(self.cache, self.rng, board, self.clock)
        self.liar = Liar(self.cache, self.rng, live)
        fill(self.cache, self.user)
        assert self.cache.check() == []
        self.image = bytes(self.cache._attachment.data)
        self.image_time = self.clock.now
        self.image_values = {key: list(values) for key, values in self.user.has_had.items()}
        self.table_end = (layout.HEADER_WORDS + self.liar.geometry.processes * layout.PROCESS_WORDS) * 8

    def attach(self) -> Cache:
        return Cache.attach(self.name, lock_timeout=LOCK_TIMEOUT, clock=self.clock)

    def run(self) -> None:
        grown = 0
        for number in range(ROUNDS):
            try:
                self.round()
            except BaseException as error:
                error.add_note(f"seed {self.seed!r}, round {number}, at {self.board.doing()}, after lies {self.kinds}")
                raise
            self.board.words[Board.ROUNDS] = number + 1
            self.board.words[Board.LIES] = self.liar.count
            if number == ROUNDS // 10:
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.restore()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
        assert grown < GROWTH, f"it grew by {grown} KiB"

    def round(self) -> None:
        rng, liar, user = self.rng, self.liar, self.user
        self.restore()
        self.kinds = some_kinds(rng)
        user.strict = set(self.kinds) <= set(liar.LINKS)
        for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
            liar.lie(rng.choice(self.kinds))
        for _ in range(OPERATIONS):
            if rng.randrange(2):
                liar.lie(rng.choice(self.kinds))
            assert user.act() or liar.gave_lock, "LockTimeout, though no live process was given the lock"
        if liar.gave_lock:
            self.take_back_locks()
        user.demand_order()
        if rng.randrange(8) == 0:
            self.attach_anew()

    def restore(self) -> None:
        """All as it was after the beginning."""
        self.liar.data[:] = self.image
        self.liar.before.clear()
        self.liar.gave_lock = False
        self.clock.now = self.image_time
        self.user.has_had = {key: list(values) for key, values in self.image_values.items()}

    def take_back_locks(self) -> None:
        """Nobody can take a lock from a live process. So what a lie gave away is taken back, and so is the table."""
        self.liar.data[: self.table_end] = self.image[: self.table_end]
        free_locks(self.cache)
        self.liar.gave_lock = False

    def attach_anew(self) -> None:
        """Close the cache and attach with lies in its header, which is refused or works."""
        self.cache.close()
        for _ in range(self.rng.randrange(3)):
            self.liar.lie("header")
        self.board.begin("attach")
        with contextlib.suppress(CorruptSegment, IncompatibleSegment), self.attach() as self.user.cache:
            self.user.strict = False
            for _ in range(3):
                self.user.act()
            self.user.demand_order()
        header = layout.HEADER_WORDS * 8
        self.liar.data[:header] = self.image[:header]
        self.cache = self.user.cache = self.attach()
        # Its line of the process table has another generation now.
        self.image = b"".join(
            (self.image[:header], self.liar.data[header : self.table_end], self.image[self.table_end :])
        )


def some_kinds(rng: random.Random) -> tuple[str, ...]:
    return rng.choice((Liar.LINKS, (rng.choice(Liar.KINDS),), tuple(rng.sample(Liar.KINDS, 3))))


def free_locks(cache: Cache) -> None:
    geometry = cache._attachment.geometry
    for shard in range(geometry.shards):
        cache._attachment.words[geometry.region(shard).header + layout.S_LOCK] = 0


def besiege(name: str, live: int, seed: str, board: Board) -> None:
    Siege(name, live, seed, board).run()


# --- damage meanwhile -----------------------------------------------------------------------------------------------
def prepare() -> None:
    """In a child: map what it attaches to between guards, and forget what its parent has attached to."""
    faulthandler.enable()
    vars(attachment)["mmap"] = SimpleNamespace(mmap=map_guarded)
    attachment._attachments.clear()


def use_for_ever(name: str, timeout: float, seed: str, board: Board) -> None:
    """Use the cache while somebody lies about it. Until killed: no moment of the damage is a good one to end."""
    prepare()
    rng = random.Random(seed)
    while True:
        try:
            cache = Cache.attach(name, lock_timeout=timeout)
            break
        except (CorruptSegment, IncompatibleSegment, LockTimeout):  # the header is a lie just now, or all attach
            pass
    user = User(cache, rng, board, Clock(monotonic()))
    user.strict = False
    while True:
        assert user.act() or timeout == LOCK_TIMEOUT, "LockTimeout, though no live process was given the lock"
        board.words[Board.ROUNDS] += 1


def lie_for_ever(name: str, live: int, kinds: tuple[str, ...], seed: str, board: Board) -> None:
    prepare()
    rng = random.Random(seed)
    liar = Liar(Cache.attach(name), rng, live)
    image = bytes(liar.data)
    table_end = (layout.HEADER_WORDS + liar.geometry.processes * layout.PROCESS_WORDS) * 8
    for number in itertools.count():
        liar.lie(rng.choice(kinds))
        if rng.randrange(4):  # mostly it is true again at once, so that what comes after meets something sound
            liar.take_back()
        if number % 4096 == 0:
            liar.data[table_end:] = image[table_end:]
        liar.before.clear()
        board.words[Board.LIES] = liar.count


def storm(trial: Trial, family: Family, number: int) -> None:
    """Two processes use a cache while a third one lies about it, at full speed."""
    kinds = some_kinds(trial.rng)
    about_locks = not {"lock", "anywhere", "bytes", "processes"}.isdisjoint(kinds)
    with trial.cache(**CACHES[number % 2], clock=(clock := Clock(monotonic()))) as cache:
        user = User(cache, trial.rng, Board(), clock)
        fill(cache, user)
        table_end = (layout.HEADER_WORDS + cache._attachment.geometry.processes * layout.PROCESS_WORDS) * 8
        image = bytes(cache._attachment.data[:table_end])
        boards = [Board() for _ in range(3)]
        timeout = LOCK_TIMEOUT if about_locks else 5.0
        seed = f"{trial.seed}-storm-{number}"
        children = [family.fork(use_for_ever, cache.name, timeout, f"{seed}-{each}", boards[each]) for each in range(2)]
        children.append(family.fork(lie_for_ever, cache.name, owner_of(cache), kinds, seed, boards[2]))
        ends = time.monotonic() + EPOCH
        while time.monotonic() < ends or not boards[2].words[Board.LIES]:
            watch(children, boards, f"{seed}, lies {kinds}")
            time.sleep(0.005)
        for child in children:
            assert child.kill() == -signal.SIGKILL, f"a child ended by itself, {seed}, lies {kinds}"
        trial.count("mutations", boards[2].words[Board.LIES])
        trial.count("operations meanwhile", boards[0].words[Board.ROUNDS] + boards[1].words[Board.ROUNDS])
        clock.now = monotonic()
        cache._attachment.data[:table_end] = image
        free_locks(cache)
        try:
            user.demand_order()
        except Exception as error:
            error.add_note(f"after {seed}, lies {kinds}")
            raise


def watch(children: list[Child], boards: list[Board], what: str) -> bool:
    """Fail if one of them died or hangs; whether the first one is through."""
    for child, board in zip(children, boards, strict=True):
        if child.status is None:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                child.status = os.waitstatus_to_exitcode(status)
                assert child.status == 0, f"a child ended with {child.status} at {board.doing()}: {what}"
        since = board.words[Board.SINCE]
        if child.status is None and since and time.monotonic_ns() - since > LONGEST * 1e9:
            child.signal(signal.SIGABRT)  # says where it is
            child.wait()
            raise AssertionError(f"{board.doing()} has lasted for {LONGEST} s: {what}")
    return children[0].status is not None


def rounds(trial: Trial) -> Iterator[None]:
    """A round is a child's work of damage and repair, with storms while it works."""
    storms = itertools.count()
    with no_gc():
        for number in itertools.count():
            with trial.cache(**CACHES[number % 2]) as cache, Family() as family:
                board, seed = Board(), f"{trial.seed}-{number}"
                child = family.fork(besiege, cache.name, owner_of(cache), seed, board)
                while not watch([child], [board], seed):
                    storm(trial, family, next(storms))
                trial.count("mutations", board.words[Board.LIES])
                trial.count("repairs", board.words[Board.ROUNDS])
            yield


PART = Part(
    claim="whatever is overwritten in the segment, operations give a value, a miss or an error; `repair()` mends it",
    rounds=rounds,
    short=2,
)
