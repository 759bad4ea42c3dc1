"""The codec keeps every type it takes, refuses every other by name and place, and survives any bytes at all."""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
import sys
import threading
from collections import OrderedDict, namedtuple
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shmcache.codec import MAX_NESTING, Codec, Extension, decode_key, encode_key
from shmcache.errors import SerializationError

CODEC = Codec()
Point = namedtuple("Point", "x y")
BERLIN = ZoneInfo("Europe/Berlin")
PICKLE_HINT = r'Cache\(\.\.\., serializer="pickle"\)'


class Colour(IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class FixedZone(tzinfo):
    def utcoffset(self, dt: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def dst(self, dt: datetime | None) -> None:
        return None

    def tzname(self, dt: datetime | None) -> str:
        return "fixed"


class Evil:
    """Leaves a trace if anything unpickles it."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _leave_trace, ()


TRACES: list[str] = []


def _leave_trace() -> None:
    TRACES.append("loaded")


def same(left: Any, right: Any) -> bool:
    """Equal with the same types all the way down; NaN is the same as NaN and 0.0 is not -0.0."""
    if type(left) is not type(right):
        return False
    if type(left) in (list, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if type(left) is dict:
        return len(left) == len(right) and all(
            same(pair, other) for pair, other in zip(left.items(), right.items(), strict=True)
        )
    if type(left) in (set, frozenset):
        return bool(left == right) and sorted(map(repr, map(type, left))) == sorted(map(repr, map(type, right)))
    if type(left) is float:
        return struct.pack(">d", left) == struct.pack(">d", right) or (math.isnan(left) and math.isnan(right))
    if type(left) in (complex, Decimal):
        return repr(left) == repr(right)
    if type(left) in (datetime, time):
        return bool(
            left.replace(tzinfo=None) == right.replace(tzinfo=None)
            and left.fold == right.fold
            and type(left.tzinfo) is type(right.tzinfo)
            and repr(left.tzinfo) == repr(right.tzinfo)
        )
    return bool(left == right)


def nested(levels: int, wrap: Callable[[Any], Any], value: Any = 1) -> Any:
    for _ in range(levels):
        value = wrap(value)
    return value


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    127,
    -(2**63),
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63) - 1,
    2**127,
    -(2**127),
    10**5000,
    -(10**5000),
    0.0,
    -0.0,
    1.5,
    math.inf,
    math.nan,
    "",
    "text",
    "é😀\0",
    b"",
    b"\xc4\xff",
    [],
    [1, [2, [3]]],
    (),
    (1,),
    (1, (2, [3, (4,)])),
    {},
    {"a": 1, 2: "b", None: 3, 1.5: 4, b"k": 5, (1, ("x",)): 6, 2**70: 7, frozenset({1}): 8, date(2024, 1, 1): 9},
    {"plain": {"list": [{"text": "x", "blob": b"\xc4"}]}},
    set(),
    {1, "a", (2, 3), frozenset({4})},
    frozenset(),
    frozenset({1, "a"}),
    bytearray(),
    bytearray(b"\xc4abc"),
    [bytearray(b"in a list"), {"k": bytearray(b"in a dict")}],
    complex(1.5, -0.0),
    complex(math.inf, math.nan),
    Decimal("0"),
    Decimal("-0.00"),
    Decimal("1.10"),
    Decimal("1E+999999"),
    Decimal("NaN123"),
    Decimal("sNaN"),
    Decimal("-Infinity"),
    UUID("12345678-1234-5678-1234-567812345678"),
    date.min,
    date.max,
    time.min,
    time(1, 2, 3, 4, fold=1),
    time(1, 2, tzinfo=UTC),
    time(1, 2, tzinfo=BERLIN),
    timedelta.min,
    timedelta.max,
    timedelta(days=-1, microseconds=1),
    datetime.min,
    datetime.max,
    datetime(2024, 2, 29, 12, 30, 15, 999999),
    datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    datetime(2024, 1, 1, tzinfo=timezone(-timedelta(seconds=1, microseconds=7))),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1), "CET")),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "zulu")),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2024, 10, 27, 2, 30, fold=1),
    {"rows": [{"id": 1, "at": datetime(2024, 1, 1), "price": Decimal("9.99")}], "tags": {"a"}},
]


def identify(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", VALUES, ids=identify)
def test_every_type_comes_back_as_it_was(value: object) -> None:
    restored = CODEC.decode(CODEC.encode(value))
    assert type(restored) is type(value)
    assert same(restored, value)


@pytest.mark.parametrize("value", VALUES, ids=identify)
@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}], ids=["list", "tuple", "dict"])
def test_every_type_comes_back_from_inside_a_container(value: object, wrap: Callable[[Any], Any]) -> None:
    assert same(CODEC.decode(CODEC.encode(wrap(value))), wrap(value))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.decimals()
    | st.uuids()
    | st.dates()
    | st.timedeltas()
    | st.times()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones())
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8).filter(
    lambda value: "nan" not in repr(value).lower()  # It equals nothing, so sets of it cannot be compared.
)
ANY_VALUE = st.recursive(
    SCALARS | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | HASHABLE, inner, max_size=5)
        | st.sets(HASHABLE, max_size=5)
        | st.frozensets(HASHABLE, max_size=5)
    ),
    max_leaves=30,
)


@given(ANY_VALUE)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_value_comes_back_as_it_was(value: object) -> None:
    assert same(CODEC.decode(CODEC.encode(value)), value)


def test_plain_values_are_plain_msgpack() -> None:
    value = {"id": 1, "name": "x", "tags": ["a", None, True, 1.5, b"\xc4"]}
    assert CODEC.encode(value) == msgpack.packb(value)


def test_the_codes_never_change() -> None:
    assert {code.name: code.value for code in Extension} == {
        "TUPLE": 1,
        "SET": 2,
        "FROZENSET": 3,
        "BYTEARRAY": 4,
        "BIG_INT": 5,
        "COMPLEX": 6,
        "DECIMAL": 7,
        "UUID": 8,
        "DATETIME": 9,
        "DATE": 10,
        "TIME": 11,
        "TIMEDELTA": 12,
        "NUMPY_ARRAY": 13,
        "NUMPY_SCALAR": 14,
        "NUMPY_STR": 15,
        "NUMPY_BYTES": 16,
        "PICKLE": 32,
        "SERIALIZER": 33,
    }


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ((1, "a"), "d6 01 92 01 a1 61"),
        (bytearray(b"a"), "d4 04 61"),
        (2**64, "c7 09 05 01 00 00 00 00 00 00 00 00"),
        (Decimal("1.5"), "c7 03 07 31 2e 35"),
        (date(2024, 1, 2), "c7 06 0a 93 cd 07 e8 01 02"),
    ],
)
def test_the_bytes_are_those_documented(value: object, data: str) -> None:
    assert CODEC.encode(value) == bytes.fromhex(data)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("value", "place", "why"),
    [
        (object(), r"value: ", "object is not a type"),
        ({"rows": [1, 2, 3, object()]}, r"value\['rows'\]\[3\]: ", "object is not a type"),
        ({"p": Point(1, 2)}, r"value\['p'\]: ", r"test_codec\.Point would come back as a plain tuple"),
        ([Colour.RED], r"value\[0\]: ", r"test_codec\.Colour would come back as a plain int"),
        (OrderedDict(a=1), r"value: ", r"collections\.OrderedDict would come back as a plain dict"),
        ((Text("x"),), r"value\[0\]: ", r"test_codec\.Text would come back as a plain str"),
        ({Text("x"): 1}, r"value\[key 'x'\]: ", r"test_codec\.Text would come back as a plain str"),
        ({(1, Colour.RED): 1}, r"value\[key .*\]\[1\]: ", r"test_codec\.Colour"),
        ([{frozenset({Point(1, 2)})}], r"value\[0\]\{.*\}\{Point\(x=1, y=2\)\}: ", r"test_codec\.Point"),
        ([memoryview(b"x")], r"value\[0\]: ", "memoryview is not a type"),
        ({memoryview(b"x"): 1}, r"value\[key .*\]: ", "memoryview is not a type"),
        ([msgpack.ExtType(1, b"\x90")], r"value\[0\]: ", r"msgpack\.ext\.ExtType would come back as a plain tuple"),
        ({"t": msgpack.Timestamp(1)}, r"value\['t'\]: ", r"msgpack\.ext\.Timestamp is not a type"),
        ([range(3)], r"value\[0\]: ", "range is not a type"),
        ({"a": [datetime(2024, 1, 1, tzinfo=FixedZone())]}, r"value\['a'\]\[0\]: ", r"test_codec\.FixedZone"),
        ({10**5000: object()}, r"value\[.*int.*\]: ", "object is not a type"),
    ],
)
def test_a_type_that_would_not_come_back_is_refused(value: object, place: str, why: str) -> None:
    with pytest.raises(SerializationError, match=f"cannot store {place}.*{why}.*{PICKLE_HINT}"):
        CODEC.encode(value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("\ud800", "value: "),
        ({"a": ["x", "b\udfff"]}, r"value\['a'\]\[1\]: "),
        ({"\ud800": 1}, r"value\[key '\\ud800'\]: "),
        (("\ud800",), r"value\[0\]: "),
    ],
)
def test_a_lone_surrogate_is_refused(value: object, place: str) -> None:
    with pytest.raises(SerializationError, match=place + "a str with the lone surrogate"):
        CODEC.encode(value)


def test_a_container_in_itself_is_refused_where_it_is() -> None:
    loop: dict[str, Any] = {"list": [1, ()]}
    loop["list"].append(loop)
    with pytest.raises(SerializationError, match=r"value\['list'\]\[2\]: a container that contains itself"):
        CODEC.encode(loop)
    items: list[Any] = []
    items.append((items,))
    with pytest.raises(SerializationError, match="contains itself"):
        CODEC.encode(items)


def test_a_container_met_twice_side_by_side_is_no_loop() -> None:
    shared = (1, 2)
    assert CODEC.decode(CODEC.encode([shared, shared, {"k": shared}])) == [shared, shared, {"k": shared}]


WRAPPERS: list[Callable[[Any], Any]] = [
    lambda v: (v,),
    lambda v: frozenset({v}),
    lambda v: [(v,)],
    lambda v: {"k": (v,)},
    lambda v: ([v],),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("levels", [1, 3, MAX_NESTING // 2, MAX_NESTING])
def test_what_is_nested_comes_back_or_is_refused(wrap: Callable[[Any], Any], levels: int) -> None:
    value = nested(levels, wrap)
    try:
        data = CODEC.encode(value)
    except SerializationError:
        assert levels == MAX_NESTING  # Two containers to a level.
    else:
        assert CODEC.decode(data) == value


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}, *WRAPPERS])
def test_nesting_without_end_is_refused(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(SerializationError, match="nested"):
        CODEC.encode(nested(5000, wrap, ()))


def test_plain_lists_and_dicts_may_be_nested_hundreds_deep() -> None:
    value = nested(200, lambda v: [{"k": v}])
    assert CODEC.decode(CODEC.encode(value)) == value


def test_a_small_stack_suffices_for_the_deepest_value() -> None:
    value = nested(MAX_NESTING, lambda v: (v,), datetime(2024, 1, 1))
    restored: list[object] = []
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: restored.append(CODEC.decode(CODEC.encode(value))))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert restored == [value]


def test_a_little_python_stack_left_is_an_error_of_ours() -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
            return
        with pytest.raises(SerializationError):
            CODEC.encode(nested(MAX_NESTING, lambda v: (v,)))

    frame: Any = sys._getframe()
    used = 0
    while frame is not None:
        used, frame = used + 1, frame.f_back
    descend(sys.getrecursionlimit() - used - 60)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes that nobody wrote


def extension(code: int, payload: bytes) -> bytes:
    data: bytes = msgpack.packb(msgpack.ExtType(code, payload))
    return data


def refused(data: bytes, codec: Codec = CODEC) -> str:
    with pytest.raises(SerializationError) as caught:
        codec.decode(data)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\xa5abc",
        b"\xa1\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\xff\xff\xff\xff" * 2000,
        b"\x91" * 100_000,
        (b"\xdd" + (1_000_000).to_bytes(4, "big")) * 1000 + bytes(1_000_000),  # Each asks for a million items.
        b"\x81\x90\x01",
        b"\x81\x80\x01",
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    assert "not a value shmcache can read" in refused(data)


PACKED = {
    Extension.TUPLE: [b"", b"\xa1a", b"\x81\x01\x02", b"\x92\x01", b"\x90\x90"],
    Extension.SET: [b"\x91\x90", b"\x01", b""],
    Extension.FROZENSET: [b"\x91\x80", b"\xc0"],
    Extension.COMPLEX: [b"", b"\0" * 15, b"\0" * 17],
    Extension.DECIMAL: [b"", b"x", b"\xff", b"1e5e5"],
    Extension.UUID: [b"", b"\0" * 15],
    Extension.DATETIME: [b"", b"\x90", b"\x99" + b"\x01" * 8, msgpack.packb([0, 1, 1, 0, 0, 0, 0, 0, None])],
    Extension.DATE: [
        b"\x93\x01\x01",
        msgpack.packb([2024, 2, 30]),
        b"\x91\x01",
        msgpack.packb([msgpack.ExtType(5, b"\x01"), 1, 1]),
    ],
    Extension.TIME: [msgpack.packb([24, 0, 0, 0, 0, None]), msgpack.packb([0, 0, 0, 0, 2, None])],
    Extension.TIMEDELTA: [msgpack.packb([10**12, 0, 0]), msgpack.packb([b"", 0, 0])],
    Extension.NUMPY_STR: [b"\xff"],
}


@pytest.mark.parametrize(("code", "payload"), [(code, payload) for code in PACKED for payload in PACKED[code]])
def test_malformed_payloads_are_refused(code: Extension, payload: bytes) -> None:
    refused(extension(code, payload))
    refused(msgpack.packb([1, {"k": msgpack.ExtType(code, payload)}]))


@pytest.mark.parametrize(
    "zone",
    ["", "Nowhere/City", "../../etc/passwd", "/etc/passwd", "a\0b", "Europe", 5, [], [1], [10**12, None], [0, 1]],
)
def test_malformed_time_zones_are_refused(zone: object) -> None:
    refused(extension(Extension.DATETIME, msgpack.packb([2024, 1, 1, 0, 0, 0, 0, 0, zone])))
    refused(extension(Extension.TIME, msgpack.packb([0, 0, 0, 0, 0, zone])))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 16, 17, 255, 256, 65535, 65536])
def test_an_extension_is_written_as_msgpack_writes_it(size: int) -> None:
    assert CODEC.encode(bytearray(size)) == extension(Extension.BYTEARRAY, bytes(size))


def test_an_unknown_extension_is_refused_by_its_code() -> None:
    assert "msgpack extension 99" in refused(extension(99, b"x"))


def test_bytes_nested_without_end_are_refused() -> None:
    data = b"\x90"
    for _ in range(1000):
        data = extension(Extension.TUPLE, b"\x91" + data)
    assert f"more than {MAX_NESTING} levels" in refused(data)


HOSTILE_EXTENSION = st.builds(
    lambda code, payload: extension(int(code), payload),
    st.sampled_from([code for code in Extension if code not in (Extension.PICKLE, Extension.SERIALIZER)]),
    st.binary(max_size=60) | ANY_VALUE.map(CODEC.encode),
)


@given(st.binary(max_size=200) | HOSTILE_EXTENSION)
@example(b"\xc7\x00\x01")
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    for read in (CODEC.decode, decode_key):
        with suppress(SerializationError):
            read(data)


@given(ANY_VALUE, st.data())
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_damaged_bytes_are_a_value_or_refused(value: object, data: st.DataObject) -> None:
    damaged = bytearray(CODEC.encode(value))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(SerializationError):
        CODEC.decode(bytes(damaged))


# ---------------------------------------------------------------------------------------------------------------------
# Other serializers


class Marked:
    """A serializer of the application: JSON behind a mark."""

    def dumps(self, obj: Any, /) -> bytes:
        return b"marked:" + json.dumps(obj).encode()

    def loads(self, data: bytes, /) -> Any:
        return json.loads(data.removeprefix(b"marked:"))


@pytest.mark.parametrize("value", [Point(1, 2), Colour.RED, OrderedDict(a=1), Text("x"), ["\ud800"], "\ud800", 2**64])
def test_pickle_takes_what_msgpack_refuses(value: object) -> None:
    codec = Codec("pickle")
    restored = codec.decode(codec.encode(value))
    assert type(restored) is type(value)
    assert restored == value


@pytest.mark.parametrize("value", ["x", b"x", 1, -(2**63), 2**63 - 1, 1.5, True, None])
@pytest.mark.parametrize("serializer", ["pickle", Marked()], ids=["pickle", "object"])
def test_scalars_are_msgpack_whatever_the_serializer(value: object, serializer: Any) -> None:
    assert Codec(serializer).encode(value) == msgpack.packb(value)


def test_a_pickle_is_never_loaded_unasked() -> None:
    TRACES.clear()
    attack = extension(Extension.PICKLE, pickle.dumps(Evil()))
    assert 'serializer="pickle"' in refused(attack)
    inside = [attack, extension(Extension.TUPLE, b"\x91" + attack), b"\x91" + attack, b"\x81" + attack + b"\x01"]
    for data in inside:
        assert "written with pickle" in refused(data)
        assert "written with pickle" in refused(data, Codec(Marked()))
        with pytest.raises(SerializationError, match="written with pickle"):
            decode_key(data)
    assert TRACES == []
    Codec("pickle").decode(attack)
    assert TRACES == ["loaded"]


def test_a_serializer_that_gives_text_is_told_to_encode_it() -> None:
    with pytest.raises(
        SerializationError, match=r"returned str, not bytes: encode it, as in `return json\.dumps\(obj\)"
    ):
        Codec(json).encode([1])  # type: ignore[arg-type]


async def _coroutine() -> None: ...


async def _asynchronous() -> AsyncIterator[int]:
    yield 1


def test_what_no_serializer_keeps_is_not_sent_to_pickle() -> None:
    coroutine = _coroutine()
    for value, says in (
        (coroutine, "coroutine is not .*; await it, and store what that gives$"),
        ((n for n in [1]), r"generator is not .*; store what it yields, for instance list\(...\) of it$"),
        (_asynchronous(), "async_generator is not .*; store what it yields, for instance as a list$"),
        (lambda: 1, "function is not .*; store what it returns$"),
        (nested, f"function is not .*{PICKLE_HINT}"),
    ):
        with pytest.raises(SerializationError, match=says):
            CODEC.encode({"a": value})
    coroutine.close()


def test_failures_of_pickle_are_errors_of_ours() -> None:
    codec = Codec("pickle")
    with pytest.raises(SerializationError, match=r"serializer 'pickle' failed on function"):
        codec.encode(lambda: None)
    refused(extension(Extension.PICKLE, b"not a pickle"), codec)
    refused(extension(Extension.PICKLE, b"cno_such_module\nname\n."), codec)


def test_pickle_reads_what_msgpack_wrote() -> None:
    assert Codec("pickle").decode(CODEC.encode((1, {2}))) == (1, {2})


def test_a_serializer_object_is_used_and_needed() -> None:
    codec = Codec(Marked())
    data = codec.encode({"a": [1]})
    assert data == extension(Extension.SERIALIZER, b'marked:{"a": [1]}')
    assert codec.decode(data) == {"a": [1]}
    for other in (CODEC, Codec("pickle")):
        assert "written with a serializer object" in refused(data, other)
    refused(extension(Extension.SERIALIZER, b"not json"), codec)
    with pytest.raises(SerializationError, match="failed on object: TypeError"):
        codec.encode(object())


def test_a_serializer_has_to_return_bytes() -> None:
    with pytest.raises(SerializationError, match="returned str, not bytes"):
        Codec(json).encode([1])  # type: ignore[arg-type]


def test_a_serializer_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown serializer 'yaml': choose 'msgpack', 'pickle'"):
        Codec("yaml")
    with pytest.raises(TypeError, match=r"dumps\(obj\) -> bytes .* not int"):
        Codec(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["msgpack", "pickle"])
def test_a_codec_can_be_pickled_and_copied(name: str) -> None:
    codec = Codec(name)
    for twin in (pickle.loads(pickle.dumps(codec)), copy.copy(codec)):
        assert twin.serializer == name
        assert twin.decode(codec.encode({"a": (1,)})) == {"a": (1,)}


def test_threads_may_share_a_codec() -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        value = {"n": number, "t": (number, [number] * 50), "s": "x" * number}
        wrong.extend(1 for _ in range(300) if CODEC.decode(CODEC.encode(value)) != value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_value_after_one_that_failed_is_not_touched_by_it() -> None:
    for _ in range(10):
        with pytest.raises(SerializationError):
            CODEC.encode(["left over", object()])
        assert CODEC.encode(["new"]) == msgpack.packb(["new"])


def test_large_values_come_back() -> None:
    value = {"blob": b"\xc4" * 3_000_000, "pair": ("x" * 3_000_000, bytearray(70_000))}
    assert same(CODEC.decode(CODEC.encode(value)), value)


# ---------------------------------------------------------------------------------------------------------------------
# Keys

KEYS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**64,
    -(2**200),
    0.0,
    1.0,
    math.inf,
    "",
    "1",
    b"",
    b"1",
    (),
    (1,),
    (1.0,),
    (True,),
    ("1",),
    (b"1",),
    (None,),
    ((),),
    ((1,),),
    (1, 2),
    ((1, 2),),
    ((1,), 2),
    (1, (2,)),
    ("a", b"b", 2**70, 1.5, None, True, ("c", (0.0,))),
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_every_key_comes_back_as_it_was(key: object) -> None:
    assert same(decode_key(encode_key(key)), key)


def test_keys_are_kept_apart_by_type() -> None:
    assert len({encode_key(key) for key in KEYS}) == len(KEYS)


KEY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)


def typed(key: Any) -> object:
    """The identity of a key: its type and value all the way down."""
    return (tuple, tuple(map(typed, key))) if type(key) is tuple else (type(key), key)


@given(KEY, KEY)
def test_keys_have_the_same_bytes_exactly_if_they_are_the_same(left: object, right: object) -> None:
    assert (encode_key(left) == encode_key(right)) == (typed(left) == typed(right))
    assert typed(decode_key(encode_key(left))) == typed(left)
    assert encode_key(decode_key(encode_key(left))) == encode_key(left)


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: (v,), lambda v: ("a", (1, v))])
def test_zero_has_one_sign(wrap: Callable[[Any], Any]) -> None:
    assert encode_key(wrap(-0.0)) == encode_key(wrap(0.0))
    assert same(decode_key(encode_key(wrap(-0.0))), wrap(0.0))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (math.nan, r"key: NaN"),
        ((1, ("a", math.nan)), r"key\[1\]\[1\]: NaN"),
        ([1], r"key: list is not a key type; keys are str, bytes, int, float, bool, None, and tuples of these"),
        ((1, (2, {})), r"key\[1\]\[1\]: dict is not a key type; keys are str"),
        ((1, Colour.RED), r"key\[1\]: .*test_codec\.Colour is not a key type"),
        (Text("x"), r"Text is not a key type"),
        (Point(1, 2), r"Point is not a key type"),
        (Decimal(1), r"decimal\.Decimal is not a key type"),
        (bytearray(b"x"), r"bytearray is not a key type"),
        ((1, bytearray(b"x")), r"key\[1\]: bytearray is not a key type"),
        (frozenset(), r"frozenset is not a key type"),
        ("\ud800", r"key: a str with the lone surrogate"),
        (("a", "\ud800"), r"key\[1\]: a str with the lone surrogate"),
        (nested(MAX_NESTING + 1, lambda v: (v,)), f"nested more than {MAX_NESTING} levels"),
        (nested(5000, lambda v: (v,)), f"nested more than {MAX_NESTING} levels"),
    ],
)
def test_what_is_no_key_is_refused(key: object, message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        encode_key(key)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x90",
        b"\xcc\x01",  # 1 in two bytes.
        b"\xcb" + struct.pack(">d", -0.0),
        b"\xcb" + struct.pack(">d", math.nan),
        b"\xca" + struct.pack(">f", 1.5),
        extension(Extension.BIG_INT, b"\x01"),
        extension(Extension.BIG_INT, b"\0" + b"\x01" * 9),
        extension(Extension.SET, b"\x90"),
        extension(Extension.TUPLE, b"\x91\x90"),
        extension(Extension.TUPLE, b"\xdc\0\0"),
    ],
)
def test_bytes_that_no_key_has_are_refused(data: bytes) -> None:
    with pytest.raises(SerializationError):
        decode_key(data)


# ---------------------------------------------------------------------------------------------------------------------
# numpy

np: Any = pytest.importorskip("numpy")

STRUCTURED = np.dtype(
    [("id", "<i4"), ("pos", [("x", ">f8"), ("name", "S3")]), ("grid", "<u2", (2, 3)), ("at", "<M8[ms]")]
)
ALIGNED = np.dtype([("a", "i1"), ("b", "f8"), (("a title", "c"), "i2")], align=True)
ARRAYS = [
    np.arange(12).reshape(3, 4),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(24).reshape(2, 3, 4)[:, ::-1, ::2],
    np.arange(5, dtype=">i4"),
    np.arange(5, dtype="<u2"),
    np.array(7),
    np.array(7.5, dtype=">f4"),
    np.array([]),
    np.empty((0, 3), "f4"),
    np.empty((2, 0, 3), "i8"),
    np.array([True, False]),
    np.array([1.5, -0.0, np.inf], dtype="f2"),
    np.array([1.5], dtype=np.longdouble),
    np.array([1 + 2j], dtype="c8"),
    np.array(["2024-01-01", "NaT"], dtype="M8[ns]"),
    np.array([1, 2], dtype="m8[25us]"),
    np.array(["NaT"], dtype="M8[s]"),
    np.array(["a", "bé\0c"]),
    np.array([b"a", b"bc"]),
    np.array([b"ab\0"], dtype="V3"),
    np.empty(3, "V0"),
    np.arange(3, dtype=np.longlong),
    np.arange(3, dtype=np.ulonglong),
    np.zeros(3, STRUCTURED),
    np.zeros((2, 2), ALIGNED),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_back_as_they_were(array: Any) -> None:
    restored: Any = CODEC.decode(CODEC.encode({"a": [array]}))["a"][0]  # type: ignore[index]
    assert type(restored) is np.ndarray
    assert restored.dtype == array.dtype
    assert restored.dtype.type is array.dtype.type
    assert restored.shape == array.shape
    assert restored.tobytes() == array.tobytes()
    assert restored.flags.writeable
    assert restored.flags.f_contiguous or not array.flags.f_contiguous
    alone: Any = CODEC.decode(CODEC.encode(array))
    assert alone.tobytes() == array.tobytes()


NUMPY_SCALARS = [
    np.bool_(True),
    np.int8(-1),
    np.uint64(2**64 - 1),
    np.longlong(5),
    np.ulonglong(5),
    np.float16(1.5),
    np.float32(1.5),
    np.float64(1.5),
    np.longdouble(1) / 3,
    np.complex64(1 + 2j),
    np.datetime64("2024-01-01T00:00", "ns"),
    np.datetime64("NaT", "s"),
    np.timedelta64(3, "D"),
    np.str_("té\0"),
    np.bytes_(b"x\0"),
    np.void(b"abc"),
    np.void(b""),
    np.ones(1, STRUCTURED)[0],
]


@pytest.mark.parametrize("scalar", NUMPY_SCALARS, ids=lambda scalar: f"{type(scalar).__name__}")
def test_numpy_scalars_come_back_as_they_were(scalar: Any) -> None:
    restored: Any = CODEC.decode(CODEC.encode([scalar]))
    assert type(restored[0]) is type(scalar)
    assert restored[0].dtype == scalar.dtype
    assert restored[0].tobytes() == scalar.tobytes()
    if isinstance(scalar, (str, bytes)):
        assert len(restored[0]) == len(scalar)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array([object()]), "dtype object cannot be kept"),
        (np.zeros(1, [("a", "i4"), ("o", "O")]), "cannot be kept"),
        (np.zeros(1, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]})), "cannot be kept"),
        (np.rec.array([(1,)], dtype=[("a", "i4")]), "recarray is not a type"),
        (np.ma.masked_array([1], [True]), "MaskedArray is not a type"),
        (np.rec.array([(1,)], dtype=[("a", "i4")])[0], "numpy.record.* cannot be kept"),
    ],
    ids=["object", "object field", "overlap", "recarray", "masked", "record"],
)
def test_arrays_that_would_not_come_back_are_refused(array: Any, why: str) -> None:
    with pytest.raises(SerializationError, match=rf"value\['a'\]: .*{why}.*{PICKLE_HINT}"):
        CODEC.encode({"a": array})


def array_bytes(dtype: object, shape: object, items: bytes, order: object = "C") -> bytes:
    header: bytes = msgpack.packb([dtype, order, shape])
    return extension(Extension.NUMPY_ARRAY, len(header).to_bytes(4, "big") + header + items)


@pytest.mark.parametrize(
    "data",
    [
        array_bytes("<i4", [10**9], b"\0" * 4),
        array_bytes("<i4", [2**32, 2**32], b""),
        array_bytes("<i4", [0, 2**63], b""),
        array_bytes("<i4", [-1, -1], b"\0" * 4),
        array_bytes("<i4", [True], b"\0" * 4),
        array_bytes("<i4", ["1"], b"\0" * 4),
        array_bytes("<i4", 1, b"\0" * 4),
        array_bytes("<i4", [1] * 100, b"\0" * 4),
        array_bytes("<i4", [1], b"\0" * 4, order="X"),
        array_bytes("<i4", [1], b"\0" * 4, order=1),
        array_bytes("|O", [1], b"\0" * 8),
        array_bytes("O", [1], b"\0" * 8),
        array_bytes("object", [1], b"\0" * 8),
        array_bytes("i4,O", [1], b"\0" * 12),
        array_bytes("(1000000000,)i4", [1], b"\0" * 4),
        array_bytes([["a", "|O"]], [1], b"\0" * 8),
        array_bytes([["a", [["b", "O"]]]], [1], b"\0" * 8),
        array_bytes([["a", "<i4", [10**9]]], [1], b"\0" * 4),
        array_bytes([["a", "<i4", [2**63]]], [1], b"\0" * 4),
        array_bytes([[1, "<i4"]], [1], b"\0" * 4),
        array_bytes([["a"]], [1], b"\0" * 4),
        array_bytes("|V9999999999", [1], b"\0" * 4),
        array_bytes("<M8[furlong]", [1], b"\0" * 8),
        array_bytes({}, [1], b""),
        array_bytes(None, [1], b"\0" * 8),
        extension(Extension.NUMPY_ARRAY, b""),
        extension(Extension.NUMPY_ARRAY, b"\xff\xff\xff\xff"),
        extension(Extension.NUMPY_SCALAR, b""),
    ],
)
def test_hostile_arrays_are_refused(data: bytes) -> None:
    refused(data)


def test_a_scalar_has_no_shape() -> None:
    header: bytes = msgpack.packb(["<i4", "C", [2]])
    refused(extension(Extension.NUMPY_SCALAR, len(header).to_bytes(4, "big") + header + b"\0" * 8))


def test_without_numpy_an_array_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [CODEC.encode(value) for value in (np.arange(3), np.float32(1), np.str_("x"), np.bytes_(b"x"))]
    monkeypatch.setitem(sys.modules, "numpy", None)
    for stored in data:
        assert "install numpy" in refused(stored)


def test_keys_that_would_become_one_are_refused() -> None:
    nan = float("nan")
    for value in (
        {Decimal("NaN"): 1, Decimal("NaN"): 2},
        {(nan,): 1, (float("nan"),): 2},
        [{complex(nan, 0): 1, complex(float("nan"), 0): 2}],
    ):
        with pytest.raises(SerializationError, match="have one form when stored"):
            Codec().encode(value)
