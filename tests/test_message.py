"""Plain lists and dicts are read and written as by the msgpack library, and all else is left to the codec.

Compiled, what is read goes through a cache, for the engine's classes have no way in from Python.
"""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmcache import Cache, SerializationError, codec, is_compiled
from shmcache.engine.layout import KNOWN_KEYS, MAX_PLAIN, PLAIN_DEPTH, SCRATCH
from shmcache.engine.message import Message, pack_plain
from tests.conftest import new_name
from tests.test_codec import nested, same

CODEC = codec.Codec()
REFUSED = object()
LEFT = object()
ROW = {"id": 1234, "name": "Ada", "mail": "ada@example.org", "active": True, "score": 9.5}

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


class Raw(tuple[bytes]):
    """Is stored as the bytes that it holds."""

    __slots__ = ()


class Text(str):
    __slots__ = ()


def by_codec(data: bytes) -> object:
    try:
        return CODEC.decode(data)
    except SerializationError:
        return REFUSED


class Through:
    """Reads messages the way a `get` does, and knows what was left to the codec."""

    def __init__(self) -> None:
        self.left = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shmcache.cache.Codec", lambda serializer: self)
            self.cache = Cache(new_name(), max_bytes="8MB", max_entries=16)

    def encode(self, value: Raw) -> bytes:
        return bytes(value[0])

    def decode(self, data: bytes) -> object:
        self.left = True
        return LEFT

    def read(self, data: bytes) -> object:
        """The value, or LEFT."""
        if is_compiled():
            self.cache.set("key", Raw((data,)))
            value = self.cache.get("key")
            return by_codec(data) if value is LEFT and len(data) > SCRATCH else value  # the large ones always are
        reader = Message()
        reader.scratch = memoryview(bytearray(data + b"\0\xa3abc\x93\0\0\0"))  # what was there before
        value = reader.unpack(len(data))
        return LEFT if value is None else value


@pytest.fixture
def through() -> Iterator[Through]:
    through = Through()
    yield through
    assert through.cache.check() == []
    through.cache.unlink()
    through.cache.close()


@pytest.fixture
def read(through: Through) -> Callable[[bytes], object]:
    return through.read


def write(value: object) -> bytes | None:
    return pack_plain(value) if is_compiled() else Message().pack(value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-300, 300)
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(lambda text, size: text * size, st.sampled_from(["x", "ä", b"x"]), st.sampled_from([31, 256, 70_000]))
)
KEYS = SCALARS | st.sampled_from(["id", "name", "", "ключ", "x" * 31, "x" * 40])
PLAIN = st.recursive(
    st.lists(SCALARS, max_size=20) | st.dictionaries(KEYS, SCALARS, max_size=20),
    lambda inner: st.lists(inner | SCALARS, max_size=20) | st.dictionaries(KEYS, inner | SCALARS, max_size=6),
    max_leaves=12,
)
EDGES = [
    *(
        [sign * 2**power + step]
        for power in (0, 5, 7, 8, 15, 16, 31, 32, 62, 63)
        for sign in (1, -1)
        for step in (-1, 0, 1)
        if sign * 2**power + step >= -(2**63)
    ),
    *([text * size] for text in ("x", b"x") for size in (0, 1, 31, 32, 255, 256, 65_535, 65_536)),
    *([[None] * size, dict.fromkeys(range(size), False)] for size in (0, 1, 15, 16, 65_535, 65_536)),
    [2**64 - 1, 0.0, -0.0, float("inf"), float("nan"), -5e-324, "é", "😀", "\0", None, True, False],
    {None: 1, 1: 2, 1.5: 3, b"k": 4, "k": 5, -1: 6, False: 7, "é": 8, "x" * 40: 9, "x" * 300: 10, "": 11},
]


UNKNOWN_MARKS = {0xCA, *range(0xC7, 0xCA), *range(0xD4, 0xD9)}  # extensions, and floats of 32 bits


def compare(read: Callable[[bytes], object], data: bytes) -> None:
    """What is read is what the codec reads; what is not, it refuses, or there may be something in it for the codec."""
    found = read(data)
    expected = by_codec(data)
    if found is not LEFT:
        assert same(found, expected), data
    elif type(expected) in (list, dict):
        assert UNKNOWN_MARKS.intersection(data), data


def is_written(value: object) -> bool:
    """Whether there is no int above 63 bits in it."""
    if type(value) is dict:
        return is_written([*value, *value.values()])
    if type(value) is list:
        return all(map(is_written, value))
    return type(value) is not int or value < 1 << 63


@pytest.mark.parametrize("value", EDGES, ids=lambda value: msgpack.packb(value)[:12].hex())
def test_every_size_is_read_and_written_as_by_msgpack(read: Callable[[bytes], object], value: Any) -> None:
    data = msgpack.packb(value)
    assert same(read(data), value)
    assert write(value) == (data if is_written(value) else None)
    assert CODEC.encode(value) == data


@given(PLAIN)
@unhurried
def test_plain_values_are_read_and_written_as_by_msgpack(read: Callable[[bytes], object], value: object) -> None:
    data = msgpack.packb(value)
    assert same(read(data), CODEC.decode(data))
    assert write(value) == (data if is_written(value) and len(data) <= MAX_PLAIN else None)
    assert CODEC.encode(value) == data


@given(PLAIN, st.data())
@unhurried
def test_damaged_messages_are_read_as_by_the_codec_or_not_at_all(
    read: Callable[[bytes], object], value: object, draw: st.DataObject
) -> None:
    data = bytearray(msgpack.packb(value))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, min(len(data), 200) - 1))] = draw.draw(st.integers(0, 255))
    if 0x80 <= data[0] < 0xA0 or 0xDC <= data[0] <= 0xDF:  # others are not for this part
        compare(read, bytes(data))


@given(st.sampled_from([b"\x83", b"\x95", b"\xdc\0\x05", b"\xde\0\x02"]), st.binary(max_size=40))
@unhurried
def test_any_bytes_are_read_as_by_the_codec_or_not_at_all(
    read: Callable[[bytes], object], head: bytes, rest: bytes
) -> None:
    compare(read, head + rest)


def test_a_message_that_is_cut_short_or_goes_on_is_left(read: Callable[[bytes], object]) -> None:
    value = {"é": ["text", b"bytes", 1.5, -300, 70_000, "x" * 300, {"x" * 40: None}], "k": [[], {}], 5: b"x" * 300}
    data = msgpack.packb(value)
    assert same(read(data), value)
    for size in range(1, len(data)):
        assert read(data[:size]) is LEFT
    assert read(data + b"\xc0") is LEFT


@pytest.mark.parametrize(
    "data",
    [
        *(b"\x91" + bytes([mark]) + b"\xff\xff\xff\xff" for mark in (0xC6, 0xDB, 0xDD, 0xDF)),
        b"\xdd\xff\xff\xff\xff" + b"\xc0" * 50,
        b"\xdf\xff\xff\xff\xff" + b"\xc0" * 50,
        b"\x81\xd9\xff" + b"x" * 50,
        b"\x81\xbf" + b"x" * 5,
    ],
    ids=bytes.hex,
)
def test_a_lying_length_takes_no_memory(read: Callable[[bytes], object], data: bytes) -> None:
    read(data)
    tracemalloc.start()
    try:
        assert read(data) is LEFT
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert by_codec(data) is REFUSED


@pytest.mark.parametrize(
    "data",
    [
        b"\x91\xc1",  # a mark that means nothing
        b"\x91\xa2\xc3\x28",  # no UTF-8
        b"\x81\xa2\xc3\x28\x01",
        b"\x81\xa3\xed\xa0\x80\x01",  # a lone surrogate
        b"\x81\x90\x01",  # keys that are containers
        b"\x81\x80\x01",
    ],
    ids=bytes.hex,
)
def test_what_is_no_value_is_left_and_refused(read: Callable[[bytes], object], data: bytes) -> None:
    assert read(data) is LEFT
    assert by_codec(data) is REFUSED


@pytest.mark.parametrize("data", [msgpack.packb([1.5], use_single_float=True), CODEC.encode([(1,)])], ids=bytes.hex)
def test_what_the_codec_alone_knows_is_left(read: Callable[[bytes], object], data: bytes) -> None:
    assert read(data) is LEFT
    assert type(by_codec(data)) is list


def test_other_values_that_the_engine_does_not_know_are_left(through: Through) -> None:
    for data in (CODEC.encode((1,)), CODEC.encode(2**64), b"\xc1"):
        through.cache.set("unknown", Raw((data,)))
        assert through.cache.get("unknown") is LEFT


def test_of_equal_keys_the_first_stays_with_the_last_value(read: Callable[[bytes], object]) -> None:
    for pairs in ([("a", 1), ("b", 2), ("a", 3)], [(1, "int"), (1.0, "float"), (True, "bool")]):
        data = bytes([0x80 | len(pairs)]) + b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in pairs)
        assert same(read(data), CODEC.decode(data))


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"k": value}], ids=["list", "dict"])
def test_deep_values_are_left(read: Callable[[bytes], object], wrap: Callable[[object], object]) -> None:
    deepest: object = nested(PLAIN_DEPTH, wrap)
    data = msgpack.packb(deepest)
    assert same(read(data), deepest)
    assert write(deepest) == data
    deeper = wrap(deepest)
    assert read(msgpack.packb(deeper)) is LEFT
    assert write(deeper) is None
    assert same(CODEC.decode(CODEC.encode(deeper)), deeper)


@pytest.mark.parametrize(
    "value",
    [
        (1,),
        date(2024, 1, 1),
        bytearray(b"x"),
        2**64,
        2**63,
        Text("x"),
        "\ud800",
        {(1,): 2},
        {"\ud800": 1},
        {1, 2},
        msgpack.ExtType(1, b""),
        memoryview(b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_is_not_written(value: object) -> None:
    assert write([1, value]) is None
    assert write({"a": 1, "b": value}) is None
    assert write({"a": [value], "b": 1}) is None


def test_what_contains_itself_is_not_written() -> None:
    ring: list[object] = [1]
    ring.append({"ring": ring})
    assert write(ring) is None
    with pytest.raises(SerializationError, match="contains itself"):
        CODEC.encode(ring)


@pytest.mark.parametrize("size", [SCRATCH - 5, SCRATCH, 5 * SCRATCH, MAX_PLAIN // 4 + 1, MAX_PLAIN - 6, MAX_PLAIN - 5])
@pytest.mark.parametrize("kind", [str, bytes, None])
def test_messages_of_up_to_a_mebibyte_are_written(size: int, kind: type | None) -> None:
    value: list[object] = [0] * (size - 5) if kind is None else ["x" * size if kind is str else b"x" * size]
    data = msgpack.packb(value)
    assert write(value) == (data if len(data) <= MAX_PLAIN else None)
    assert CODEC.encode(value) == data
    assert write(ROW) == msgpack.packb(ROW)


def test_keys_are_shared_and_bounded(read: Callable[[bytes], object]) -> None:
    """The keys of equal rows are one object; that many were read before is not remembered."""
    for _ in range(2):
        for number in range(3 * KNOWN_KEYS):
            for kind in ("key ", "ключ ", "a long key " * 4):
                rows = [{f"{kind}{number}": number}] * 2
                found: Any = read(msgpack.packb(rows))
                assert same(found, rows)
                assert next(iter(found[0])) is next(iter(found[1]))


@pytest.mark.skipif(not is_compiled(), reason="the msgpack library interns keys, which Python 3.12 then keeps")
def test_keys_that_were_read_are_not_kept(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes="1MB")

    def read_many(start: int) -> None:
        for number in range(start, start + 5_000):
            cache.set("row", {f"a key of its own {number}": 1})
            cache.get("row")

    read_many(0)
    tracemalloc.start()
    try:
        read_many(5_000)
        before = tracemalloc.get_traced_memory()[0]
        read_many(10_000)
        assert tracemalloc.get_traced_memory()[0] - before < 5_000 * 10
    finally:
        tracemalloc.stop()


def test_nothing_is_leaked(read: Callable[[bytes], object]) -> None:
    messages = [
        msgpack.packb([ROW, {"é": [b"x", {"k": -1}, None, 70_000], "x" * 40: 1.5}, {5: "x" * 40}]),
        b"\x82\xa2id\x93\x01\xa3abc\xc1\x01",
        b"\x82\xa2id\x93\x01\xa3abc\xcd",
        b"\x82\xa2id\x81\xa2\xc3\x28\x01\x01",
        b"\x81\x91\xa3abc\x01",
    ]
    values: list[object] = [ROW, {"a": [1, "é", b"x"], "b": (1,)}, ["\ud800"], [2**64], {"x" * 400: [1.5, None, True]}]
    key = next(iter(ROW))

    def work() -> None:
        for _ in range(100):
            for data in messages:
                read(data)
            for value in values:
                write(value)

    work()
    gc.collect()
    before = sys.getrefcount(key), sys.getrefcount(values[0]), sys.getrefcount(None)
    tracemalloc.start()
    try:
        work()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            work()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - first < 2_000
    finally:
        tracemalloc.stop()
    after = sys.getrefcount(key), sys.getrefcount(values[0]), sys.getrefcount(None)
    assert [new - old < 50 for old, new in zip(before, after, strict=True)] == [True] * 3


def test_threads_do_not_see_what_others_read(through: Through) -> None:
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        row = {f"{number} {field}": [number, f"{field}", {"deep": number}] for field in range(30)}
        through.cache.set(number, Raw((msgpack.packb(row),)))
        start.wait()
        for _ in range(300):
            found = through.cache.get(number)
            if found is not LEFT and found != row:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not is_compiled(), reason="the sources leave it to the msgpack library")
def test_compiled_a_cache_needs_no_codec_for_plain_containers(through: Through) -> None:
    values: list[object] = [[], {}, ROW, [ROW], dict.fromkeys(range(20), 1), list(range(20))]
    for value in values:
        through.cache.set("plain", Raw((msgpack.packb(value),)))
        assert same(through.cache.get("plain"), value)


@pytest.mark.skipif(is_compiled(), reason="compiled, these do the work")
def test_uncompiled_it_is_the_msgpack_library_that_writes() -> None:
    assert pack_plain(ROW) is None
