"""The contract of `Cache`, method by method, on caches of every shape: what holds for one shape holds for all."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import math
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy
import pytest

from shmcache import (
    DEFAULT,
    Batch,
    Cache,
    CacheClosed,
    CacheNotFound,
    KeyTooLarge,
    Pending,
    SerializationError,
    ValueTooLarge,
    is_compiled,
    parse_size,
    segment,
)
from tests.conftest import Clock

MakeCache = Callable[..., Cache]

SHAPES: dict[str, dict[str, Any]] = {
    "one_shard": {"max_bytes": "1MB", "max_entries": 500, "shards": 1},
    "many_shards": {"max_bytes": "4MB", "max_entries": 2000, "shards": 8},
    "tiny": {"max_bytes": 24_576, "max_entries": 8},
    "large": {} if is_compiled() else {"max_bytes": "20MB", "max_entries": 6_000, "shards": 3},
    "scarce": {"max_bytes": 40_960, "max_entries": 100},
    "odd_size": {"max_bytes": 150_001, "max_entries": 77},
}

KEYS: list[Any] = [
    "",
    "1",
    "k" * 300,
    "ключ",
    b"",
    b"1",
    b"\xff\x00",
    0,
    1,
    -1,
    2**63 - 1,
    -(2**63),
    2**63,
    2**64,
    -(2**200),
    0.0,
    1.0,
    -1.5,
    math.inf,
    True,
    False,
    None,
    (),
    ((),),
    (1,),
    (1.0,),
    (True,),
    ("1",),
    (b"1",),
    (None,),
    ("user", 7, (b"x", (2.5, None))),
]

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    127,
    128,
    -32,
    -33,
    -128,
    -129,
    32_767,
    32_768,
    -(2**31),
    2**31,
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    2**64,
    -(2**300),
    0.0,
    -0.0,
    1.5,
    math.inf,
    "",
    "a" * 31,
    "a" * 32,
    "a" * 255,
    "a" * 256,
    "snow ☃ and 🎈",
    "nul \0 inside",
    b"",
    b"\x00\xff",
    b"b" * 255,
    b"b" * 256,
    bytearray(b"array"),
    [],
    [1, [2, [3, None]]],
    {},
    {"a": 1, 2: "b", None: [True], (1, 2): {"deep": (b"x",)}},
    (),
    (1, (2.0, "3")),
    set(),
    {1, "2"},
    frozenset({b"3"}),
    datetime(2024, 2, 29, 12, 30, 15, 123456),
    datetime(2024, 2, 29, tzinfo=UTC),
    date(1999, 12, 31),
    time(23, 59, 59, 999999),
    timedelta(days=-1, microseconds=5),
    Decimal("1.10"),
    UUID(int=2**127 + 1),
    complex(1, -2),
]


@pytest.fixture(params=SHAPES)
def cache(request: pytest.FixtureRequest, make_cache: MakeCache, clock: Clock) -> Cache:
    """A fresh cache of one shape, whose time is the test's clock."""
    return make_cache(clock=clock, **SHAPES[request.param])


def room(cache: Cache) -> int:
    """The most bytes that a key and its encoded value may have together."""
    return int(cache._attachment.geometry.max_entry_bytes)


def largest(cache: Cache, key_bytes: int) -> int:
    """How many bytes the longest bytes value has that fits under a key of this length."""
    left = room(cache) - key_bytes
    for head, most in ((2, 0xFF), (3, 0xFFFF), (5, 0xFFFF_FFFF)):
        if left - head <= most:
            return left - head
    raise AssertionError("no cache of these tests is so large")


def pattern(size: int) -> bytes:
    """Bytes of which no part equals another."""
    return random.Random(size).randbytes(size)


# --- get, set and their kin -----------------------------------------------------------------------------------------
def test_get_returns_what_was_set(cache: Cache) -> None:
    assert cache.get("k") is None
    assert cache.get("k", 5) == 5
    cache.set("k", "one")
    assert cache.get("k") == "one"
    cache.set("k", "two")
    assert cache.get("k", 5) == "two"
    assert len(cache) == 1


def test_stored_none_is_a_hit(cache: Cache) -> None:
    cache.set("k", None)
    assert cache.get("k", "default") is None
    assert "k" in cache
    assert cache["k"] is None
    assert cache.get_many(["k", "other"]) == {"k": None}
    assert not cache.add("k", 1)
    assert cache.get_or_set("k", lambda: 1) is None
    assert cache.gets("k", "default")[0] is None
    with cache.batch() as batch:
        got = batch.get("k", "default")
    assert got.value is None
    assert cache.pop("k", "default") is None
    assert "k" not in cache


def test_every_key_type_is_kept_apart(cache: Cache) -> None:
    for key in KEYS:
        cache.set(key, "mine")
        assert cache.get(key) == "mine"
        assert [repr(each) for each in cache] == [repr(key)]
        for other in KEYS:
            if repr(other) != repr(key):
                assert cache.get(other) is None, (key, other)
        assert cache.delete(key)


def test_zero_and_minus_zero_are_one_key(cache: Cache) -> None:
    cache.set(-0.0, "zero")
    assert cache.get(0.0) == "zero"
    assert cache.get((0.0,)) is None
    cache.set((0.0, 1), "pair")
    assert cache.get((-0.0, 1)) == "pair"


def test_every_value_keeps_its_type(cache: Cache) -> None:
    for value in VALUES:
        cache.set("k", value)
        with cache.batch() as batch:
            batched = batch.get("k")
        found = [
            cache.get("k"),
            cache["k"],
            cache.get_many(["k"])["k"],
            cache.gets("k")[0],
            dict(cache.items())["k"],
            batched.value,
            cache.pop("k"),
        ]
        for each in found:
            assert type(each) is type(value)
            assert each == value
            assert isinstance(value, (set, frozenset)) or repr(each) == repr(value)


def test_nan_is_a_value(cache: Cache) -> None:
    cache.set("k", math.nan)
    assert math.isnan(cache["k"])


@pytest.mark.parametrize(
    "array",
    [numpy.arange(12.0).reshape(3, 4), numpy.array([], dtype="int8"), numpy.float32(1.5), numpy.array("x")],
    ids=["matrix", "empty", "scalar", "text"],
)
def test_numpy_keeps_type_and_shape(cache: Cache, array: Any) -> None:
    cache.set("k", array)
    found = cache["k"]
    assert type(found) is type(array)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert (found == array).all()


def test_add_stores_only_what_is_missing(cache: Cache, clock: Clock) -> None:
    assert cache.add("k", 1, ttl=10) is True
    assert cache.add("k", 2, ttl=99) is False
    assert cache["k"] == 1
    assert cache.ttl("k") == 10.0
    clock.advance(10)
    assert cache.add("k", 3) is True
    assert cache["k"] == 3


def test_replace_stores_only_over_what_is_there(cache: Cache, clock: Clock) -> None:
    assert cache.replace("k", 1) is False
    assert "k" not in cache
    cache.set("k", 1, ttl=5)
    assert cache.replace("k", 2) is True
    assert cache["k"] == 2
    assert cache.ttl("k") is None
    assert cache.replace("k", 3, ttl=5) is True
    clock.advance(5)
    assert cache.replace("k", 4) is False
    assert "k" not in cache


def test_delete_tells_whether_it_was_there(cache: Cache, clock: Clock) -> None:
    assert cache.delete("k") is False
    cache.set("k", 1)
    assert cache.delete("k") is True
    assert cache.delete("k") is False
    cache.set("k", 1, ttl=1)
    clock.advance(1)
    assert cache.delete("k") is False


def test_pop_removes_and_returns(cache: Cache, clock: Clock) -> None:
    cache.set("k", [1])
    assert cache.pop("k") == [1]
    with pytest.raises(KeyError) as caught:
        cache.pop("k")
    assert caught.value.args == ("k",)
    assert cache.pop("k", None) is None
    assert cache.pop("k", 3) == 3
    cache.set("k", 1, ttl=1)
    clock.advance(1)
    assert cache.pop("k", "gone") == "gone"


def test_mapping_protocol(cache: Cache) -> None:
    with pytest.raises(KeyError) as caught:
        cache["k"]
    assert caught.value.args == ("k",)
    with pytest.raises(KeyError):
        del cache["k"]
    cache["k"] = 1
    cache["l"] = (2,)
    assert cache["k"] == 1
    assert ("k" in cache, "x" in cache) == (True, False)
    assert len(cache) == 2
    assert sorted(cache) == ["k", "l"]
    assert sorted(cache.keys()) == ["k", "l"]
    assert dict(cache.items()) == {"k": 1, "l": (2,)}
    assert sorted(cache.values(), key=repr) == [(2,), 1]
    del cache["k"]
    assert "k" not in cache
    assert list(cache) == ["l"]


def test_an_empty_cache_is_empty_everywhere(cache: Cache) -> None:
    assert len(cache) == 0
    assert list(cache) == list(cache.items()) == list(cache.values()) == []
    assert cache.get_many(["a"]) == {}
    assert cache.delete_many(["a"]) == 0
    assert cache.purge() == 0
    cache.clear()
    assert cache.stats().entries == 0


def test_keys_with_a_prefix(cache: Cache) -> None:
    for key in ("user:1", "user:2", "post:1", b"user:3", ("user:4",), 5):
        cache.set(key, 0)
    assert sorted(cache.keys("user:")) == ["user:1", "user:2"]
    assert sorted(cache.keys(prefix="")) == ["post:1", "user:1", "user:2"]
    assert list(cache.keys(b"user:")) == [b"user:3"]
    assert list(cache.keys("nothing")) == []


def test_iteration_skips_the_expired_and_sees_each_entry_once(cache: Cache, clock: Clock) -> None:
    count = min(cache.max_entries // 4, 300)
    for number in range(count):
        cache.set(number, str(number))
        cache.set(("brief", number), number, ttl=1)
    clock.advance(1)
    assert sorted(cache) == list(range(count))
    assert sorted(cache.items()) == [(number, str(number)) for number in range(count)]
    assert sorted(cache.values(), key=int) == [str(number) for number in range(count)]
    assert len(cache) == count


def test_iterating_while_writing(cache: Cache) -> None:
    for number in range(6):
        cache.set(number, number)
    for key in cache:
        cache.delete(key)
    assert len(cache) == 0


# --- time to live ---------------------------------------------------------------------------------------------------
def test_an_entry_lives_exactly_its_ttl(cache: Cache, clock: Clock) -> None:
    cache.set("k", 1, ttl=10)
    assert cache.ttl("k") == 10.0
    clock.advance(4.5)
    assert cache.ttl("k") == 5.5
    clock.advance(5.499_999_999)
    assert cache.get("k") == 1
    clock.advance(0.000_000_001)
    assert cache.get("k") is None
    assert "k" not in cache
    with pytest.raises(KeyError):
        cache["k"]
    with pytest.raises(KeyError):
        cache.ttl("k")
    with pytest.raises(KeyError):
        cache.info("k")
    assert cache.gets("k") == (None, None)
    assert cache.get_many(["k"]) == {}
    assert len(cache) == 0


@pytest.mark.parametrize("ttl", [1e-9, 0.001, 1, 1.5, 127.9, 128, 129, 1000, 86_400 * 365.0, 4e9, True + 1])
def test_any_ttl_is_kept_to(cache: Cache, clock: Clock, ttl: float) -> None:
    cache.set("k", 1, ttl=ttl)
    cache.set("forever", 2, ttl=None)
    clock.advance(ttl - ttl / 1000)
    assert cache.get("k") == (1 if ttl > 1e-8 else None)
    clock.advance(ttl / 1000 + 1e-6)
    assert cache.get("k") is None
    assert cache.get("forever") == 2
    assert len(cache) == 1


def test_ttl_of_an_entry_without_one_is_none(cache: Cache) -> None:
    cache.set("k", 1)
    assert cache.ttl("k") is None
    with pytest.raises(KeyError):
        cache.ttl("missing")


def test_writing_again_starts_the_ttl_anew(cache: Cache, clock: Clock) -> None:
    cache.set("k", 1, ttl=10)
    clock.advance(9)
    cache.set("k", 2, ttl=10)
    clock.advance(9)
    assert cache.get("k") == 2
    cache.set("k", 3)
    clock.advance(1e6)
    assert cache.get("k") == 3


def test_touch_gives_a_new_ttl(cache: Cache, clock: Clock) -> None:
    assert cache.touch("k", 5) is False
    cache.set("k", 1, ttl=10)
    clock.advance(9)
    assert cache.touch("k", 20) is True
    assert cache.ttl("k") == 20.0
    clock.advance(19)
    assert cache["k"] == 1
    assert cache.touch("k", None) is True
    assert cache.ttl("k") is None
    assert cache.touch("k") is True
    assert cache.ttl("k") is None
    assert cache.touch("k", 1) is True
    clock.advance(1)
    assert cache.touch("k", 5) is False
    assert "k" not in cache


@pytest.mark.parametrize("shape", SHAPES)
def test_default_ttl(make_cache: MakeCache, clock: Clock, shape: str) -> None:
    cache = make_cache(clock=clock, default_ttl=10, **SHAPES[shape])
    assert cache.default_ttl == 10.0
    assert cache.stats().default_ttl == 10.0
    cache["item"] = 0
    cache.set("set", 0)
    cache.add("add", 0)
    cache.set("default", 0, ttl=DEFAULT)
    cache.set_many({"many": 0})
    cache.incr("incr", initial=0)
    assert [cache.ttl(key) for key in ("item", "set", "add", "default", "many", "incr")] == [10.0] * 6
    cache.clear()
    cache.set("none", 0, ttl=None)
    cache.set("own", 0, ttl=3)
    assert cache.ttl("none") is None
    assert cache.ttl("own") == 3.0
    assert cache.touch("own")
    assert cache.touch("none")
    assert cache.ttl("own") == cache.ttl("none") == 10.0
    assert cache.get_or_set("made", lambda: 1) == 1
    with cache.batch() as batch:
        batch.set("batched", 0)
    assert cache.ttl("made") == cache.ttl("batched") == 10.0
    clock.advance(10)
    assert len(cache) == 0


def test_default_ttl_is_the_creators_unless_given(make_cache: MakeCache, clock: Clock) -> None:
    first = make_cache(default_ttl=10, clock=clock)
    second = make_cache(first.name, clock=clock)
    third = make_cache(first.name, default_ttl=None, clock=clock)
    fourth = make_cache(first.name, default_ttl=99, clock=clock)
    assert [each.default_ttl for each in (first, second, third, fourth)] == [10.0, 10.0, None, 99.0]
    fourth.set("k", 1)
    assert first.ttl("k") == 99.0


def test_purge_removes_the_expired_only(cache: Cache, clock: Clock) -> None:
    count = min(cache.max_entries // 2, 700)
    for number in range(count):
        cache.set(number, number, ttl=1 + number % 200 if number % 2 else None)
    before = cache.stats().expirations
    clock.advance(200)
    gone = cache.purge()
    assert gone == cache.stats().expirations - before == count // 2
    assert cache.stats().entries == len(cache) == count - count // 2
    assert cache.purge() == 0


# --- incr and decr --------------------------------------------------------------------------------------------------
def test_incr_and_decr(cache: Cache) -> None:
    cache.set("k", 5)
    assert cache.incr("k") == 6
    assert cache.incr("k", 10) == 16
    assert cache.decr("k") == 15
    assert cache.decr("k", 20) == -5
    assert cache.incr("k", -5) == -10
    assert cache["k"] == -10
    assert type(cache["k"]) is int


def test_incr_of_a_missing_key_needs_initial(cache: Cache, clock: Clock) -> None:
    with pytest.raises(KeyError) as caught:
        cache.incr("k")
    assert caught.value.args == ("k",)
    with pytest.raises(KeyError):
        cache.decr("k", 2)
    assert cache.incr("k", 2, initial=40) == 42
    assert cache.incr("k", 2, initial=40) == 44
    assert cache.decr("l", 2, initial=0) == -2
    assert cache.incr("m", initial=0, ttl=5) == 1
    assert cache.ttl("m") == 5.0
    clock.advance(5)
    with pytest.raises(KeyError):
        cache.incr("m")
    assert cache.incr("m", initial=7) == 8


def test_incr_keeps_the_ttl(cache: Cache, clock: Clock) -> None:
    cache.set("k", 1, ttl=10)
    cache.set("l", 1)
    clock.advance(4)
    cache.incr("k", 1000, initial=0, ttl=99)
    cache.decr("k")
    cache.incr("l", 1, initial=0, ttl=99)
    assert cache.ttl("k") == 6.0
    assert cache.ttl("l") is None
    clock.advance(6)
    assert cache.get("k") is None


def test_incr_keeps_the_ttl_of_an_entry_that_fills_the_cache(make_cache: MakeCache, clock: Clock) -> None:
    cache = make_cache(max_bytes=24_576, max_entries=8, clock=clock, default_ttl=3)
    key = "k" * (room(cache) - 9)
    cache.set(key, 1, ttl=100)
    clock.advance(1)
    assert cache.incr(key) == 2
    assert cache.ttl(key) == 99.0


@pytest.mark.parametrize(
    "number", [0, 127, -32, -128, 255, 2**15, -(2**15), 2**31, 2**32, -(2**31), 2**63 - 2, -(2**63)]
)
def test_incr_of_numbers_of_every_size(cache: Cache, number: int) -> None:
    cache.set("k", number)
    assert cache.incr("k") == number + 1
    assert cache["k"] == number + 1
    assert cache.decr("k") == number


def test_incr_refuses_what_is_no_integer_or_does_not_fit(cache: Cache) -> None:
    for value in ("1", 1.0, None, True, b"1", [1], (1,), {1}, "x" * 40):
        cache.set("k", value)
        with pytest.raises(TypeError, match="not an integer of 64 signed bits"):
            cache.incr("k")
        assert cache["k"] == value
    for value in (2**63, 2**64 - 1, 2**64, 2**1000, 2**10_000, -(2**63) - 1, -(2**70)):
        cache.set("k", value)
        with pytest.raises(OverflowError, match="does not fit 64 signed bits"):
            cache.incr("k")
        assert cache["k"] == value
    cache.set("k", 2**63 - 1)
    with pytest.raises(OverflowError, match="unchanged"):
        cache.incr("k")
    assert cache["k"] == 2**63 - 1
    cache.set("k", -(2**63))
    with pytest.raises(OverflowError):
        cache.decr("k")
    with pytest.raises(OverflowError):
        cache.incr("k", 2**63)
    with pytest.raises(OverflowError):
        cache.incr("missing", initial=2**63)
    for bad in (1.0, "1", None, True):
        with pytest.raises(TypeError):
            cache.incr("k", bad)  # type: ignore[arg-type]
    assert cache["k"] == -(2**63)
    assert "missing" not in cache


# --- gets and cas ---------------------------------------------------------------------------------------------------
def test_cas_stores_only_over_the_version_that_was_read(cache: Cache, clock: Clock) -> None:
    assert cache.gets("k") == (None, None)
    assert cache.gets("k", 7) == (7, None)
    assert cache.cas("k", 1, 2) is False
    cache.set("k", "a", ttl=50)
    value, version = cache.gets("k")
    assert value == "a"
    assert version is not None
    assert cache.gets("k") == ("a", version)
    assert cache.cas("k", "b", version, ttl=5) is True
    assert cache["k"] == "b"
    assert cache.ttl("k") == 5.0
    assert cache.cas("k", "c", version) is False
    assert cache["k"] == "b"
    _, version = cache.gets("k")
    assert version is not None
    clock.advance(5)
    assert cache.cas("k", "d", version) is False
    assert "k" not in cache


def test_cas_with_the_version_of_a_missing_key_stores_only_if_it_still_is(cache: Cache) -> None:
    _, version = cache.gets("k")
    assert cache.cas("k", 1, version, ttl=5) is True
    assert cache.ttl("k") == 5.0
    assert cache.cas("k", 2, version) is False
    assert cache["k"] == 1
    assert cache.cas("other", 2, cache.gets("k")[1]) is False


def test_versions_never_repeat(cache: Cache, clock: Clock) -> None:
    seen: list[int] = []

    def note() -> None:
        version = cache.gets("k")[1]
        assert version is not None
        assert version == cache.info("k").version
        seen.append(version)

    def expire() -> None:
        cache.set("k", 1, ttl=1)
        clock.advance(1)
        assert cache.get("k") is None

    def put() -> None:
        cache.set("k", 1)

    changes: list[list[Callable[[], object]]] = [
        [put],
        [lambda: cache.replace("k", 1)],
        [lambda: cache.touch("k", 60)],
        [lambda: cache.incr("k")],
        [lambda: cache.cas("k", 5, seen[-1])],
        [lambda: cache.delete("k"), lambda: cache.add("k", 1)],
        [lambda: cache.pop("k"), lambda: cache.set_many({"k": 1})],
        [cache.clear, put],
        [expire, put],
        [cache.repair, put],
        [cache.repair, lambda: cache.delete("k"), put],
        [*(partial(cache.set, number, number) for number in range(20)), put],
    ]
    for _ in range(3):
        for steps in changes:
            for step in steps:
                step()
            note()
    assert len(set(seen)) == len(seen)


def test_cas_fails_after_every_kind_of_change(cache: Cache) -> None:
    def put() -> None:
        cache.set("k", 1)

    changes: list[list[Callable[[], object]]] = [
        [put],
        [lambda: cache.touch("k", 9)],
        [lambda: cache.incr("k")],
        [lambda: cache.delete("k"), put],
        [cache.clear, put],
    ]
    for steps in changes:
        put()
        version = cache.gets("k")[1]
        assert version is not None
        for step in steps:
            step()
        assert cache.cas("k", "mine", version) is False
        assert cache["k"] in (1, 2)


# --- many at once ---------------------------------------------------------------------------------------------------
def test_many_at_once(cache: Cache, clock: Clock) -> None:
    cache.set_many({"a": 1, b"b": [2], ("c",): None}, ttl=10)
    assert cache.get_many(["a", b"b", ("c",), "d"]) == {"a": 1, b"b": [2], ("c",): None}
    assert cache.ttl("a") == 10.0
    assert cache.delete_many(["a", "d", "a"]) == 1
    assert sorted(cache, key=repr) == [("c",), b"b"]
    clock.advance(10)
    assert cache.delete_many([b"b", ("c",)]) == 0
    cache.set_many({})
    assert cache.get_many([]) == {}
    assert cache.delete_many(iter(["a"])) == 0


def test_set_many_stores_nothing_if_one_cannot_be_serialized(cache: Cache) -> None:
    cache.set("a", "old")
    for bad, error in (({"a": 1, "b": object()}, SerializationError), ({"a": 1, math.nan: 2}, SerializationError)):
        with pytest.raises(error):
            cache.set_many(bad)
    with pytest.raises(ValueError, match="ttl"):
        cache.set_many({"a": 1}, ttl=0)
    assert dict(cache.items()) == {"a": "old"}


def test_set_many_names_the_key_whose_value_does_not_fit_and_keeps_and_counts_the_others(cache: Cache) -> None:
    cache.set("big", "old")
    before = cache.stats().sets
    with pytest.raises(ValueTooLarge, match=r"the value for the key 'big': .*bytes"):
        cache.set_many({"a": 1, "big": b"x" * room(cache), "b": 2})
    assert cache.get_many(["a", "b", "big"]) == {"a": 1, "b": 2, "big": "old"}
    assert cache.stats().sets == before + 2


def test_batch_mixes_everything_and_keeps_the_order_on_a_key(cache: Cache, clock: Clock) -> None:
    cache.set("n", 5)
    cache.set("gone", 1)
    with cache.batch() as batch:
        first = batch.get("k", "default")
        stored = batch.set("k", "v1", ttl=10)
        second = batch.get("k")
        added = batch.add("k", "never")
        added_new = batch.add("new", [1], ttl=None)
        replaced = batch.replace("k", "v2", ttl=20)
        third = batch.get("k")
        not_replaced = batch.replace("absent", 1)
        summed = batch.incr("n", 2)
        again = batch.decr("n")
        made = batch.incr("made", 1, initial=9, ttl=30)
        touched = batch.touch("new", 40)
        not_touched = batch.touch("absent", 40)
        deleted = batch.delete("gone")
        not_deleted = batch.delete("gone")
        last = batch.get("gone", 0)
        assert len(batch) == 16
        with pytest.raises(RuntimeError, match=r"there is no result: .* has not ended"):
            _ = first.value
        assert cache.get("k") is None
    assert first.value == "default"
    assert stored.value is True
    assert second.value == "v1"
    assert (added.value, added_new.value) == (False, True)
    assert (replaced.value, not_replaced.value) == (True, False)
    assert third.value == "v2"
    assert (summed.value, again.value, made.value) == (7, 6, 10)
    assert (touched.value, not_touched.value) == (True, False)
    assert (deleted.value, not_deleted.value, last.value) == (True, False, 0)
    assert [cache.ttl(key) for key in ("k", "new", "made", "n")] == [20.0, 40.0, 30.0, None]


@pytest.mark.parametrize("size", [0, 100, 2_000, 100_000])
def test_batch_reads_what_was_there_at_its_turn(make_cache: MakeCache, size: int) -> None:
    cache = make_cache(max_bytes="2MB")
    old, new = pattern(size) + b"old", pattern(size) + b"new"
    cache.set("k", old)
    with cache.batch() as batch:
        first = batch.get("k")
        batch.set("k", new)
        second = batch.get("k")
        batch.delete("k")
        third = batch.get("k", "none")
    assert (first.value == old, second.value == new, third.value) == (True, True, "none")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (2, 1, 2, 1)


def test_batch_gives_errors_as_results(cache: Cache) -> None:
    cache.set("text", "x")
    cache.set("most", 2**63 - 1)
    with cache.batch() as batch:
        missing = batch.incr("missing")
        text = batch.incr("text")
        most = batch.incr("most")
        fine = batch.set("fine", 1)
    with pytest.raises(KeyError):
        _ = missing.value
    with pytest.raises(TypeError, match="not an integer"):
        _ = text.value
    with pytest.raises(OverflowError):
        _ = most.value
    assert fine.value is True
    assert cache["fine"] == 1


def test_batch_with_a_value_too_large_loses_nothing_else(cache: Cache) -> None:
    cache.set("big", "old")
    with cache.batch() as batch:
        before = batch.set("a", 1)
        large = batch.set("big", b"x" * room(cache))
        kept = batch.get("big")
    assert cache["a"] == 1
    assert before.value is True
    assert kept.value == "old"
    with pytest.raises(ValueTooLarge):
        _ = large.value
    assert cache["big"] == "old"
    assert cache.stats().sets == 2


def test_batch_performs_nothing_after_an_exception_or_bad_input(cache: Cache) -> None:
    def interrupted() -> None:
        with cache.batch() as batch:
            batch.set("a", 1)
            raise ZeroDivisionError

    def with_bad_input(key: Any, value: Any, ttl: Any) -> None:
        with cache.batch() as batch:
            batch.set("a", 1)
            batch.set(key, value, ttl)

    with pytest.raises(ZeroDivisionError):
        interrupted()
    for key, value, ttl in ((math.nan, 1, None), ("k", object(), None), ("k", 1, -1)):
        with pytest.raises(ValueError, match=r"NaN|object is not|positive"):
            with_bad_input(key, value, ttl)
    assert len(cache) == 0
    with cache.batch():
        pass


def test_batch_takes_operations_in_its_block_only(cache: Cache) -> None:
    batch = cache.batch()
    operations: list[Callable[[], Pending]] = [
        lambda: batch.get("a"),
        lambda: batch.set("a", 1),
        lambda: batch.add("a", 1),
        lambda: batch.replace("a", 1),
        lambda: batch.delete("a"),
        lambda: batch.touch("a"),
        lambda: batch.incr("a", initial=0),
        lambda: batch.decr("a", initial=0),
    ]
    for operation in operations:
        with pytest.raises(RuntimeError, match=r"has not begun: write `with cache\.batch\(\) as batch:`"):
            operation()
    with batch:
        batch.set("b", 2)
        with pytest.raises(RuntimeError, match="has not ended"), batch:
            pass
    for operation in operations:
        with pytest.raises(RuntimeError, match=r"inside its `with` block only, and .* has ended: write"):
            operation()
    with pytest.raises(RuntimeError, match=r"for one `with` block, and .* has ended: make another"), batch:
        pass
    assert dict(cache.items()) == {"b": 2}


def test_batch_says_why_there_is_no_result(cache: Cache) -> None:
    def result(fails: Callable[[Batch], object]) -> Pending:
        with pytest.raises((ZeroDivisionError, SerializationError)), cache.batch() as batch:
            pending = batch.get("a")
            with pytest.raises(RuntimeError, match=r"there is no result: .* has not ended"):
                _ = pending.value
            fails(batch)
        return pending

    with pytest.raises(RuntimeError, match="block of the batch raised ZeroDivisionError, so nothing was performed"):
        _ = result(lambda batch: 1 // 0).value
    with pytest.raises(RuntimeError, match="failed at the end of its `with` block, with SerializationError"):
        _ = result(lambda batch: batch.set("a", object())).value


@pytest.mark.parametrize("step", [True, 1.5, "1", None, 2**63 + 1], ids=repr)
def test_batch_refuses_the_steps_that_incr_refuses(cache: Cache, step: Any) -> None:
    for operation in (Batch.incr, Batch.decr):
        with pytest.raises((TypeError, OverflowError), match="delta"), cache.batch() as batch:
            batch.set("a", 1)
            operation(batch, "n", step, 0)
    assert len(cache) == 0


def test_batch_get_counts_as_a_use(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB", max_entries=2)
    cache.set_many({"a": 1, "b": 2})
    with cache.batch() as batch:
        batch.get("a")
    cache.set("c", 3)
    assert sorted(cache) == ["a", "c"]


def test_get_or_set(cache: Cache, clock: Clock) -> None:
    calls: list[int] = []

    def factory() -> list[int]:
        calls.append(1)
        return [len(calls)]

    assert cache.get_or_set("k", factory, ttl=10) == [1]
    assert cache.get_or_set("k", factory) == [1]
    assert cache.ttl("k") == 10.0
    clock.advance(10)
    assert cache.get_or_set("k", factory) == [2]

    def interrupted() -> str:
        cache.set("m", "theirs")
        return "mine"

    assert cache.get_or_set("m", interrupted) == "theirs"
    with pytest.raises(ZeroDivisionError):
        cache.get_or_set("n", lambda: 1 // 0)
    assert "n" not in cache


def test_get_or_set_takes_plain_functions_only(cache: Cache) -> None:
    cache.set("k", 1)
    for key in ("k", "l"):
        with pytest.raises(TypeError, match=r"not str \('plain'\): write get_or_set\(key, lambda: value\)"):
            cache.get_or_set(key, "plain")  # type: ignore[arg-type]

    async def coroutine() -> int:
        return 1

    class Awaitable:
        def __await__(self) -> Iterator[None]:
            yield

    for factory in (coroutine, Awaitable):
        # A coroutine that was never awaited nor closed would be a warning here, and so an error.
        with pytest.raises(TypeError, match=r"plain function, .* awaitable .*memoize for an `async def`, or await"):
            cache.get_or_set("l", factory)
    assert "l" not in cache


def test_clear_empties_every_shard(cache: Cache) -> None:
    count = min(cache.max_entries // 2, 500)
    for _ in range(2):
        cache.set_many({number: str(number) for number in range(count)}, ttl=60)
        assert len(cache) == count
        cache.clear()
        assert len(cache) == 0
        assert list(cache) == []
        assert all(cache.get(number) is None for number in range(count))
        stats = cache.stats()
        assert (stats.entries, stats.bytes_used) == (0, 0)
        assert cache.check() == []


# --- bounds ---------------------------------------------------------------------------------------------------------
def test_values_of_every_size_up_to_all_there_is(cache: Cache) -> None:
    most = largest(cache, 1)
    sizes = {0, 1, 15, 16, 31, 32, 47, 48, 55, 56, 63, 64, 255, 256, 4_095, 4_096, 65_535, 65_536, 1_000_000}
    for size in sorted(size for size in sizes | {most // 3, most // 2, most - 1, most} if size <= most):
        value = pattern(size)
        cache.set("k", value)
        assert cache.get("k") == value
        assert cache.info("k").value_bytes >= size
        cache.set("l", 1)
        cache.set("k", value)
        assert cache.get("k") == value
        assert cache.check() == []


def test_the_largest_value_that_fits_and_one_byte_more(cache: Cache) -> None:
    most = largest(cache, 3)
    value = pattern(most)
    cache.set("key", value)
    assert cache.get("key") == value
    with pytest.raises(ValueTooLarge, match=f"{room(cache):,} bytes.*is kept"):
        cache.set("key", value + b"!")
    assert cache.get("key") == value
    assert cache.check() == []
    for operation in (cache.add, cache.set):
        with pytest.raises(ValueTooLarge):
            operation("other", value + b"12345")
    with pytest.raises(ValueTooLarge):
        cache.replace("key", value + b"!")
    assert cache.get("key") == value
    assert cache.stats().evictions == 0


def test_a_value_larger_than_what_is_free_evicts_no_more_than_it_must(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes=65_536, max_entries=400)
    count = 0
    while not cache.stats().evictions:
        cache.set(count, pattern(50))
        count += 1
    before = cache.stats()
    assert before.bytes_free < 3_000
    value = pattern(3_000)
    cache.set("large", value)
    assert cache.get("large") == value
    after = cache.stats()
    # Each of the others takes 2 blocks, the large one 47 blocks' worth of bytes and at most a header for each piece.
    assert 0 < after.evictions - before.evictions <= 30
    assert cache.check() == []


def test_fragments_serve_any_value_without_eviction(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes=65_536, max_entries=400, shards=1)
    count = cache.stats().bytes_free // 128
    assert count < cache.max_entries
    for number in range(count):
        cache.set(number, pattern(100))
    for number in range(0, count, 2):
        cache.delete(number)
    free = cache.stats().bytes_free
    value = pattern(free // 128 * 120 - 20)
    cache.set("large", value)
    assert cache.get("large") == value
    assert cache.stats().evictions == 0
    assert all(cache.get(number) == pattern(100) for number in range(1, count, 2))
    assert cache.check() == []
    assert cache.delete("large")
    assert cache.stats().bytes_free == free


def test_all_memory_comes_back(cache: Cache) -> None:
    free = cache.stats().bytes_free
    chance = random.Random(7)
    for _ in range(300):
        key = chance.randrange(6)
        if chance.random() < 0.3:
            cache.delete(key)
        else:
            cache.set(key, chance.randbytes(chance.randrange(min(room(cache) // 3, 20_000))))
    assert cache.check() == []
    cache.delete_many(list(cache))
    stats = cache.stats()
    assert (stats.bytes_free, stats.bytes_used, stats.entries) == (free, 0, 0)


def test_keys_up_to_the_limit(cache: Cache) -> None:
    for key in ("k" * 65_535, b"k" * 65_535, "é" * 32_767 + "k"):
        if room(cache) > 65_540:
            cache.set(key, "v")
            assert cache.get(key) == "v"
            assert list(cache) == [key]
            assert cache.delete(key)
        else:
            with pytest.raises(ValueTooLarge):
                cache.set(key, "v")
    cache.set("here", 1)
    for long in ("k" * 65_536, b"k" * 65_536, "é" * 32_768, ("k" * 65_536,), 1 << 600_000):
        for operation in (cache.get, cache.delete, cache.touch, cache.gets, cache.info, cache.pop, cache.incr):
            with pytest.raises(KeyTooLarge, match=r"at most 65,535 bytes, this one has 6|has 75,"):
                operation(long)
        with pytest.raises(KeyTooLarge):
            cache.set(long, 1)
    assert list(cache) == ["here"]


def test_max_entries_is_a_hard_bound(cache: Cache) -> None:
    bound = cache.max_entries
    for number in range(bound * 2):
        cache.set(number, number)
        if number % (bound // 50 + 1) == 0:
            assert cache.stats().entries <= bound
    stats = cache.stats()
    assert stats.entries <= bound
    assert stats.peak_entries <= bound
    assert stats.entries == len(cache) == len(list(cache))
    assert stats.evictions == 2 * bound - stats.entries
    if stats.shards == 1:
        assert stats.entries == bound
        assert sorted(cache) == list(range(bound, 2 * bound))


@pytest.mark.parametrize("entries", [1, 2, 4, 7, 20, 100])
@pytest.mark.parametrize("shards", [1, 2, 4, 16])
def test_few_entries_in_many_shards(make_cache: MakeCache, entries: int, shards: int) -> None:
    cache = make_cache(max_bytes="2MB", max_entries=entries, shards=shards)
    for number in range(300):
        cache.set(number, number)
        assert cache.get(number) == number
        assert cache.stats().entries <= entries
    assert cache.check() == []
    assert len(cache) > 0


def test_max_entries_holds_however_unevenly_the_keys_fall(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="8MB", max_entries=1_000, shards=4)
    keys: dict[int, list[int]] = {shard: [] for shard in range(4)}
    for key in range(6_000):
        cache.set(key, 0)
        keys[cache.info(key).shard].append(key)
        cache.delete(key)
    for shard in (1, 2, 3):
        cache.set_many(dict.fromkeys(keys[shard][:340], 1))
    assert len(cache) <= 1_000
    for key in keys[0][:900]:
        cache.set(key, 2)
        assert cache.get(key) == 2
    assert len(cache) <= 1_000
    assert cache.check() == []


@pytest.mark.parametrize("size", [24_576, 24_577, 30_000, 100_000, "1MB", "1.5 MiB", 5_000_001])
def test_the_segment_never_takes_more_than_max_bytes(make_cache: MakeCache, size: int | str) -> None:
    cache = make_cache(max_bytes=size, max_entries=8)
    for number in range(30):
        cache.set(number, pattern(largest(cache, 9) // (1 + number % 9)))
        assert cache.check() == []
    status = os.stat(Path(segment.DIRECTORY) / segment.file_name(cache.name))
    assert status.st_size <= parse_size(size)
    assert status.st_blocks * 512 <= parse_size(size)
    assert cache.max_bytes == cache.stats().max_bytes == parse_size(size)
    again = make_cache(cache.name, max_bytes=size, max_entries=8)
    assert again.check() == []


def test_expired_entries_are_evicted_before_live_ones(make_cache: MakeCache, clock: Clock) -> None:
    for spread in (1, 60, 500):
        cache = make_cache(max_bytes="1MB", max_entries=200, clock=clock)
        for number in range(50):
            cache.set(("live", number), number, ttl=10_000 if number % 2 else None)
        for number in range(150):
            cache.set(("brief", number), number, ttl=1 + number % spread)
        clock.advance(501)
        for number in range(150):
            cache.set(("new", number), number)
        stats = cache.stats()
        assert (stats.evictions, stats.expirations, stats.entries) == (0, 150, 200)
        assert all(cache.get(("live", number)) == number for number in range(50))


def test_expired_entries_make_room_in_every_shape(cache: Cache, clock: Clock) -> None:
    count = min(cache.max_entries, 400) // 4
    cache.set_many({("live", number): number for number in range(count)})
    cache.set_many({("brief", number): number for number in range(count * 2)}, ttl=5)
    clock.advance(5)
    cache.set_many({("new", number): number for number in range(count)})
    assert all(cache.get(("live", number)) == number for number in range(count))
    assert all(cache.get(("new", number)) == number for number in range(count))
    assert cache.stats().evictions == 0


# --- what it tells about itself -------------------------------------------------------------------------------------
def test_counters_add_up(cache: Cache, clock: Clock) -> None:
    cache.set("a", 1)
    cache.set("a", 2)
    cache.add("a", 3)
    cache.add("b", 3, ttl=5)
    cache.replace("b", 4, ttl=5)
    cache.replace("x", 4)
    cache.incr("a")
    cache.touch("a")
    cache.set_many({"c": 1, "d": 2})
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.hit_ratio) == (0, 0, None)
    assert (stats.sets, stats.deletes, stats.entries) == (7, 0, 4)
    cache.get("a")
    cache.get("x")
    cache.get_many(["a", "b", "x"])
    assert cache["c"] == 1
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.hit_ratio) == (4, 2, 4 / 6)
    cache.delete("c")
    cache.delete("x")
    cache.pop("d")
    clock.advance(5)
    assert cache.get("b") is None
    cache.purge()
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (5, 3)
    assert (stats.deletes, stats.expirations, stats.evictions, stats.entries) == (2, 1, 0, 1)
    with cache.batch() as batch:
        batch.get("a")
        batch.get("x")
        batch.set("e", 1)
        batch.delete("e")
        batch.delete("e")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (6, 4, 8, 3)
    list(cache.items())
    cache.info("a")
    cache.check()
    assert cache.stats().hits == 6


def test_what_goes_in_is_there_or_counted_as_gone(cache: Cache, clock: Clock) -> None:
    chance = random.Random(3)
    inserted = 0
    for _ in range(600):
        key = chance.randrange(40)
        if chance.random() < 0.2:
            cache.delete(key)
        elif cache.add(key, chance.randbytes(chance.randrange(200)), ttl=chance.choice([None, 1, 30])):
            inserted += 1
        clock.advance(chance.random() / 4)
    cache.purge()
    stats = cache.stats()
    assert stats.entries + stats.deletes + stats.evictions + stats.expirations == inserted == stats.sets


def test_stats_describe_the_cache(cache: Cache) -> None:
    cache.set("key", b"12345", ttl=60)
    stats = cache.stats()
    assert stats.name == cache.name
    assert stats.max_entries == cache.max_entries
    assert stats.max_bytes == cache.max_bytes
    assert 3 + 5 < stats.bytes_used < 20
    assert stats.peak_bytes == stats.bytes_used
    assert 0 < stats.bytes_free < stats.max_bytes
    assert (stats.processes, stats.recoveries, stats.entries, stats.peak_entries) == (1, 0, 1, 1)
    assert [each.pid for each in stats.attached] == [os.getpid()]
    assert stats.attached[0].sets == stats.sets == 1
    assert stats.eviction == "lru"
    plain = stats.as_dict()
    assert plain["attached"][0]["pid"] == os.getpid()
    assert plain["hits"] == 0


def test_info_describes_an_entry_without_touching_it(cache: Cache, clock: Clock) -> None:
    cache.set("key", b"12345", ttl=60)
    clock.advance(10)
    info = cache.info("key")
    assert (info.key, info.ttl, info.key_bytes, info.value_bytes) == ("key", 50.0, 3, 7)
    assert info.version == cache.gets("key")[1]
    assert 0 <= info.shard < cache.stats().shards
    assert info.as_dict()["ttl"] == 50.0
    cache.set("forever", None)
    assert cache.info("forever").ttl is None
    with pytest.raises(KeyError) as caught:
        cache.info("missing")
    assert caught.value.args == ("missing",)


def test_check_and_repair_of_a_sound_cache_change_nothing(cache: Cache, clock: Clock) -> None:
    expected = {}
    for number in range(6):
        expected[number] = pattern(number * 60)
        cache.set(number, expected[number], ttl=60 if number % 2 else None)
    before = [cache.info(number) for number in range(6)]
    assert cache.check() == []
    assert cache.repair() == []
    assert cache.check() == []
    assert dict(cache.items()) == expected
    assert [(each.ttl, each.key_bytes, each.value_bytes) for each in before] == [
        (info.ttl, info.key_bytes, info.value_bytes) for info in map(cache.info, range(6))
    ]
    clock.advance(60)
    assert len(cache) == 3


def test_repr_says_what_it_is(cache: Cache) -> None:
    assert repr(cache.name) in repr(cache)
    assert str(cache.max_entries) in repr(cache)
    cache.close()
    assert "closed" in repr(cache)


def test_repr_of_a_cache_whose_files_are_gone_makes_no_new_ones(cache: Cache, clock: Clock) -> None:
    """It stands in the log of what has just gone wrong."""
    segment.unlink(cache.name)
    clock.advance(10)
    assert repr(cache.name) in repr(cache)
    assert cache.name not in segment.names()


def test_one_that_was_never_initialized_is_an_error() -> None:
    with pytest.raises((CacheClosed, AttributeError)):
        Cache.__new__(Cache).get("key")


# --- attaching, leaving, removing -----------------------------------------------------------------------------------
def test_several_objects_of_one_name_share_everything(cache: Cache, make_cache: MakeCache, clock: Clock) -> None:
    other = make_cache(cache.name, clock=clock)
    third = Cache.attach(cache.name, clock=clock)
    cache.set("k", [1])
    assert other["k"] == third["k"] == [1]
    third.close()
    third.close()
    with pytest.raises(CacheClosed):
        third.get("k")
    other.set("k", 2)
    assert cache["k"] == 2
    assert cache.stats().processes == 1
    assert cache.stats().hits == other.stats().hits == 3
    assert (other.max_bytes, other.max_entries) == (cache.max_bytes, cache.max_entries)


def test_a_cache_outlives_its_objects(name: str, clock: Clock) -> None:
    with Cache(name, max_bytes="1MB", clock=clock) as cache:
        cache.set("k", "kept")
    with pytest.raises(CacheClosed):
        cache.get("k")
    with Cache.attach(name, clock=clock) as cache:
        assert cache["k"] == "kept"
        assert cache.max_bytes == 2**20


def test_unlink_removes_the_cache(name: str) -> None:
    cache = Cache(name, max_bytes="1MB")
    cache.set("k", 1)
    cache.unlink()
    with pytest.raises(CacheClosed):
        cache.get("k")
    with pytest.raises(CacheNotFound):
        Cache.attach(name)
    assert name not in segment.names()
    with Cache(name, max_bytes="2MB") as cache:
        assert "k" not in cache
        assert cache.max_bytes == 2 * 2**20


def test_an_unlinked_cache_is_noticed_and_made_anew(cache: Cache, make_cache: MakeCache, clock: Clock) -> None:
    other = make_cache(cache.name, clock=clock)
    shape = (other.max_bytes, other.max_entries, other.stats().shards)
    other.set("k", 1)
    cache.unlink()
    clock.advance(1)
    assert other.get("k") is None
    other.set("k", 2)
    assert (other.max_bytes, other.max_entries, other.stats().shards) == shape
    assert make_cache(cache.name, clock=clock)["k"] == 2


def test_an_ephemeral_cache_goes_with_its_last_user(name: str) -> None:
    first = Cache(name, max_bytes="1MB", ephemeral=True)
    second = Cache(name)
    first.close()
    assert name in segment.names()
    second.set("k", 1)
    second.close()
    assert name not in segment.names()
    with pytest.raises(CacheNotFound):
        Cache.attach(name)


def test_a_cache_can_be_pickled(cache: Cache) -> None:
    cache.set("k", (1, 2))
    with pickle.loads(pickle.dumps(cache)) as twin:
        assert type(twin) is Cache
        assert twin["k"] == (1, 2)
        assert (twin.name, twin.max_bytes, twin.max_entries) == (cache.name, cache.max_bytes, cache.max_entries)
        twin.set("k", 3)
    assert cache["k"] == 3


def test_a_pickle_keeps_the_options(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB", default_ttl=30, serializer="pickle", lock_timeout=2.0)
    cache.set("k", {1, 2})
    with copy.copy(cache) as twin:
        assert twin.default_ttl == 30.0
        assert twin["k"] == {1, 2}
        twin.set("l", Shape("a"))
        assert type(cache["l"]) is Shape
    assert pickle.loads(pickle.dumps(DEFAULT)) is DEFAULT


class Shape:
    """Something that only pickle can store."""

    def __init__(self, name: str) -> None:
        self.name = name


class Reversed:
    """A serializer of an application."""

    def dumps(self, obj: Any) -> bytes:
        return pickle.dumps(obj)[::-1]

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data[::-1])


@pytest.mark.parametrize("serializer", ["pickle", Reversed()], ids=["pickle", "object"])
def test_other_serializers(make_cache: MakeCache, serializer: Any) -> None:
    cache = make_cache(serializer=serializer, max_bytes="1MB")
    cache.set("k", Shape("round"))
    assert cache["k"].name == "round"
    cache.set("n", 1)
    assert cache.incr("n") == 2
    plain = make_cache(cache.name)
    assert plain["n"] == 2
    with pytest.raises(SerializationError, match="serializer"):
        plain.get("k")


@pytest.mark.parametrize("good", ["a", "A9", "0", "a.b_c-d", "x" * 90])
def test_names_that_do(make_cache: MakeCache, good: str) -> None:
    name = f"{good}-test-{os.getpid()}-n"[-100:]
    cache = make_cache(name, max_bytes="1MB")
    assert cache.name == name
    assert name in segment.names()


# --- memoize --------------------------------------------------------------------------------------------------------
def test_memoize_calls_once_for_each_set_of_arguments(cache: Cache, clock: Clock) -> None:
    calls: list[Any] = []

    @cache.memoize(ttl=10, name="add")
    def add(a: int, b: int = 2, *rest: int, scale: int = 1, **named: int) -> tuple[Any, ...]:
        """Adds."""
        calls.append((a, b, rest, scale, named))
        return (a, b, rest, scale, named)

    assert add(1) == (1, 2, (), 1, {})
    assert add(1, 2) == add(a=1) == add(b=2, a=1) == add(1, scale=1) == (1, 2, (), 1, {})
    assert len(calls) == 1
    assert add(1, 2, 3) == (1, 2, (3,), 1, {})
    assert add(1, x=1, y=2) == add(1, y=2, x=1) == (1, 2, (), 1, {"x": 1, "y": 2})
    assert len(calls) == 3
    assert add(True) == (True, 2, (), 1, {})
    assert add(1.0) == (1.0, 2, (), 1, {})  # type: ignore[arg-type]
    assert len(calls) == 5
    assert add.cache_info() == (5, 5, 5)
    assert add.cache_info().hits == 5
    assert add.__name__ == "add"  # type: ignore[attr-defined]
    assert add.__doc__ == "Adds."
    assert add.__wrapped__(7) == (7, 2, (), 1, {})
    assert len(calls) == 6
    clock.advance(10)
    assert add(1) == (1, 2, (), 1, {})
    assert len(calls) == 7


SIGNATURES: list[Callable[..., Any]] = [
    lambda: 0,
    lambda a: 0,
    lambda a, b: 0,
    lambda a, b=2: 0,
    lambda a=1, b=2: 0,
    lambda a, /, b=2, *, c=3, d=None: 0,
    lambda a, *, c: 0,
    lambda a, b=2, **named: 0,
    lambda a, *rest, c=3: 0,
]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: str(inspect.signature(function)))
def test_memoize_makes_the_same_key_of_positional_arguments_and_of_bound_ones(
    make_cache: MakeCache, function: Callable[..., Any]
) -> None:
    """The defaults of what is not given are part of it."""
    cache = make_cache(max_bytes="1MB")
    memoized = cache.memoize(name="function")(function)
    signature = inspect.signature(function)
    for count in range(4):
        args = (5, "six", 7.0)[:count]
        try:
            bound = signature.bind(*args)
        except TypeError:
            for _ in range(2):
                with pytest.raises(TypeError, match="argument"):
                    memoized(*args)
            continue
        key = memoized.cache_key(*args)
        bound.apply_defaults()
        expected = (tuple(part.items()) if isinstance(part, dict) else part for part in bound.arguments.values())
        assert key == ("memoize", "function", *expected)
        assert memoized(*args) == 0
        assert cache.delete(key)
        assert memoized(*args) == memoized(*args) == 0
        assert cache.delete(key)
    assert len(cache) == 0


def test_memoize_keys_lead_to_the_entries(cache: Cache) -> None:
    @cache.memoize()
    def double(n: int) -> int:
        return 2 * n

    @cache.memoize()
    def triple(n: int) -> int:
        return 3 * n

    assert (double(1), double(2), triple(1)) == (2, 4, 3)
    cache.set("other", 1)
    key = double.cache_key(n=1)
    assert key == double.cache_key(1)
    assert key != triple.cache_key(1)
    assert cache[key] == 2
    cache.set(key, "changed")
    assert double(1) == "changed"  # type: ignore[comparison-overlap]
    assert cache.delete(key)
    assert double(1) == 2
    assert double.cache_info().entries == 2
    assert double.cache_clear() == 2
    assert double.cache_info() == (0, 0, 0)
    assert triple.cache_info().entries == 1
    assert cache["other"] == 1


def test_memoize_keeps_none_and_not_exceptions(cache: Cache) -> None:
    calls: list[int] = []

    @cache.memoize(name="nothing")
    def nothing() -> None:
        calls.append(1)

    @cache.memoize(name="failing")
    def failing() -> None:
        calls.append(2)
        raise ZeroDivisionError

    nothing()
    nothing()
    assert calls == [1]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing()
    assert calls == [1, 2, 2]
    with pytest.raises(TypeError):
        nothing(1)  # type: ignore[call-arg]


def test_memoize_tells_what_cannot_be_a_key(cache: Cache) -> None:
    @cache.memoize()
    def length(items: Any) -> int:
        return len(items)

    for argument in ([1], {1}, (1, [2]), object(), math.nan):
        with pytest.raises(SerializationError, match=r"argument `items` of .*length cannot be .*memoize\(key="):
            length(argument)
    assert length("ab") == 2
    assert len(cache) == 1

    @cache.memoize()
    def second(first: Any, *rest: Any, **named: Any) -> Any:
        return rest[0]

    with pytest.raises(SerializationError, match=r"argument `rest` of .*second .*\(cannot use rest\[1\]: list is not"):
        second(1, 2, [3])
    with pytest.raises(SerializationError, match=r"argument `third` of .*second .*\(cannot use third: set is not"):
        second(1, 2, third={3})
    assert second(1, 2, third=3) == 2


def test_memoize_tells_when_its_key_function_returns_no_key(cache: Cache) -> None:
    @cache.memoize(key=lambda items: [*items])
    def length(items: Any) -> int:
        return len(items)

    with pytest.raises(
        SerializationError, match=r"memoize\(key=\.\.\.\) for .*length did not return a key: .* list is"
    ):
        length("ab")


def test_memoize_does_not_blame_the_arguments_for_the_value(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB")
    with Cache(cache.name, serializer="pickle") as other:

        def numbers(n: int) -> Any:
            return {1, n}

        for arguments in ({"n": 2}, {"n": 3}):
            assert other.memoize()(numbers)(**arguments) == {1, *arguments.values()}
        memoized: Any = cache.memoize()(numbers)
        for args, named in (((2,), {}), ((), {"n": 3})):
            with pytest.raises(SerializationError, match="written with pickle") as caught:
                memoized(*args, **named)
            assert "argument" not in str(caught.value)


def test_memoize_tells_closures_apart_by_what_they_close_over(cache: Cache) -> None:
    def adder(n: Any) -> Callable[[int], Any]:
        @cache.memoize()
        def add(a: int) -> Any:
            return (a, n)

        return add

    for n in (1, 2, 1.0, True, "1", b"1", None, (1, (2,))):
        assert repr(adder(n)(1)) == repr(adder(n)(1)) == repr((1, n))

    def applier(function: Callable[[int], int]) -> Callable[[int], int]:
        @cache.memoize()
        def apply(a: int) -> int:
            return function(a)

        return apply

    def times(n: int) -> Callable[[int], int]:
        return lambda a: a * n

    assert applier(lambda a: a + 1)(10) == 11
    assert applier(lambda a: a + 2)(10) == 12
    assert applier(times(3))(10) == 30
    assert applier(times(4))(10) == 40
    assert applier(abs)(10) == 10
    assert applier(cache.memoize()(times(5)))(10) == 50


class Base:
    size = 1


def test_memoize_of_closures_over_functions_classes_and_modules(cache: Cache) -> None:
    class Derived(Base):
        @cache.memoize(key=lambda self, n: n, name="grow")
        def grow(self, n: int) -> Any:
            return (super().__init__(), Base.size + n)

    def twice(n: int) -> int:
        return n * Base.size * 2

    base = Base

    @cache.memoize()
    def factorial(n: int) -> int:
        if n == 0:
            return 1
        assert math.pi > base.size
        product: int = n * factorial(n - 1) * twice(1) // 2
        return product

    local_math = math

    @cache.memoize()
    def root(n: int) -> int:
        return local_math.isqrt(n)

    assert Derived().grow(2) == Derived().grow(2) == (None, 3)
    assert factorial(5) == 120
    assert factorial.cache_info() == (0, 6, 6)
    assert root(81) == 9


def test_memoize_of_a_closure_over_anything_else_needs_a_name(cache: Cache) -> None:
    class Foo:
        def method(self, n: int) -> int:
            return n

    foo, n = Foo(), [1]

    def show(a: int) -> str:
        return f"{n} {a}"

    says = r"show closes over n, a list: two such functions would share results; .*memoize\(name=\.\.\.\)"
    with pytest.raises(TypeError, match=says):
        cache.memoize()(show)
    with pytest.raises(TypeError, match=says):
        cache.memoize(key=lambda a: a)(show)
    with pytest.raises(TypeError, match=r"the key function of .*method closes over n, a list"):
        cache.memoize(key=lambda self, a: (n, a))(Foo.method)
    with pytest.raises(TypeError, match="method is bound to self, a Foo"):
        cache.memoize()(foo.method)
    assert cache.memoize(name="show")(show)(2) == "[1] 2"
    assert cache.memoize(name="method")(foo.method)(2) == 2


def test_memoize_counts_what_is_closed_over_when_it_decorates(cache: Cache) -> None:
    n = 1

    @cache.memoize()
    def add(a: int) -> int:
        return a + n

    assert add(1) == 2
    n = 2
    assert add(1) == 2
    assert add(2) == 4


def test_memoize_refuses_what_is_no_function(cache: Cache) -> None:
    decorate: Any = cache.memoize()
    for wrong, says in (
        (partial(max, 1), "not partial .*write a def that calls it"),
        (property(len), "not a property: put it below @property, next to the def"),
        (staticmethod(len), "put it below @staticmethod"),
        (classmethod(len), "put it below @classmethod"),  # type: ignore[arg-type]
        (5, "not int"),
        (max, "max does not tell what its parameters are: write a def"),
    ):
        with pytest.raises(TypeError, match=says):
            decorate(wrong)
    with pytest.raises(TypeError, match="key is a function of the arguments that returns a key, or None, not str"):
        cache.memoize(key="id")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name is a str or None, not int"):
        cache.memoize(name=5)  # type: ignore[arg-type]
    assert decorate(lru_cache(lambda n: n + 1))(1) == 2


def test_memoize_takes_no_arguments_for_others(cache: Cache) -> None:
    @cache.memoize()
    def show(first: Any = None, *rest: Any, **named: Any) -> str:
        return repr((first, rest, named))

    # Each of these is a call of its own.
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((("kwargs", ("a", 1)),), {}),
        ((None, "kwargs", ("a", 1)), {}),
        ((None, ("kwargs", ("a", 1))), {}),
        ((), {"a": 1}),
        ((), {"kwargs": ("a", 1)}),
        ((1,), {}),
        ((True,), {}),
        ((1, 2), {}),
        (((1, 2),), {}),
    ]
    assert len({repr(show.cache_key(*args, **kwargs)) for args, kwargs in calls}) == len(calls)
    for args, kwargs in calls:
        for _ in range(2):
            assert show(*args, **kwargs) == show.__wrapped__(*args, **kwargs)
    assert show.cache_info()[:2] == (len(calls), len(calls))
    with contextlib.suppress(SerializationError):  # whether a dict can be a key or not, it is not this tuple
        assert show({"a": 1}) == show.__wrapped__({"a": 1})


def test_memoize_with_a_key_of_ones_own(cache: Cache) -> None:
    calls: list[Any] = []

    @cache.memoize(key=lambda items, strict=False: (sorted(items)[0], strict), name="smallest")
    def smallest(items: list[int], strict: bool = False) -> int:
        calls.append(items)
        return min(items)

    assert smallest([3, 1]) == smallest([1, 5]) == 1
    assert calls == [[3, 1]]
    assert smallest([1], strict=True) == 1
    assert len(calls) == 2
    assert cache[smallest.cache_key([1])] == 1
    assert smallest.cache_clear() == 2


def test_memoize_tells_functions_apart_by_their_key_functions(cache: Cache) -> None:
    def show(item: complex) -> str:
        return repr(item)

    real = cache.memoize(key=lambda item: item.real)(show)
    imag = cache.memoize(key=lambda item: item.imag)(show)
    assert real(1 + 2j) == "(1+2j)"
    assert imag(2 + 1j) == "(2+1j)"


def test_memoize_of_a_wrapper_binds_to_the_parameters_of_the_wrapper(cache: Cache) -> None:
    """The function that it wraps may have other defaults, or be given other arguments."""

    def scaled(n: int, scale: int = 1) -> int:
        return n * scale

    @wraps(scaled)
    def wrapper(n: int, scale: int = 5) -> int:
        return scaled(n, scale)

    memoized = cache.memoize()(wrapper)
    assert (memoized(2), memoized(2, 1), memoized(2, scale=5)) == (10, 2, 10)
    assert memoized.cache_info() == (1, 2, 2)

    @wraps(scaled)
    def opaque(*args: int, **kwargs: int) -> int:
        return scaled(*args, **{"scale": 5, **kwargs})

    memoized = cache.memoize()(opaque)
    assert (memoized(2), memoized(2, scale=1)) == (10, 2)
    assert (memoized(2), memoized(2, scale=1)) == (10, 2)
    assert memoized.cache_info() == (2, 2, 2)


def test_memoize_of_a_coroutine_function(cache: Cache, clock: Clock) -> None:
    calls: list[int] = []

    @cache.memoize(ttl=5, name="square")
    async def square(n: int) -> int:
        calls.append(n)
        await asyncio.sleep(0)
        return n * n

    async def main() -> list[int]:
        return [await square(3), await square(n=3), *(await asyncio.gather(square(4), square(3)))]

    assert inspect.iscoroutinefunction(square)
    assert asyncio.run(main()) == [9, 9, 16, 9]
    assert calls == [3, 4]
    assert square.cache_info() == (2, 2, 2)
    assert cache.ttl(square.cache_key(3)) == 5.0
    clock.advance(5)
    assert asyncio.run(square(3)) == 9
    assert calls == [3, 4, 3]
    assert square.cache_clear() >= 1


def test_memoize_of_a_method_keys_on_what_self_gives(cache: Cache) -> None:
    class Shop:
        def __init__(self, number: int) -> None:
            self.number = number

        @cache.memoize(key=lambda self, item: (self.number, item))
        def price(self, item: str) -> str:
            return f"{item} of {self.number}"

    assert Shop(1).price.__func__ is Shop.price  # type: ignore[attr-defined]
    assert Shop(1).price("tea") == "tea of 1"
    assert Shop(2).price("tea") == "tea of 2"


def test_memoize_makes_what_behaves_like_a_function(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(item: int) -> int:
        """Twice."""
        return 2 * item

    double.__qualname__ = "double"  # as if it were one of the module
    memoized: Any = cache.memoize(name="double")(double)

    class Shop:
        static = staticmethod(memoized)

    assert Shop().static(2) == Shop.static(2) == 4
    assert memoized.cache_info() == (1, 1, 1)
    assert inspect.signature(memoized) == inspect.signature(double)
    assert (memoized.__doc__, memoized.__module__) == ("Twice.", __name__)
    monkeypatch.setitem(globals(), "double", memoized)
    assert copy.deepcopy(memoized) is memoized
    assert pickle.loads(pickle.dumps(memoized)) is memoized
    assert callable(memoized)
    assert hash(memoized) == hash(memoized)
    assert cache.check() == []


def test_memoize_asks_the_get_that_a_cache_has(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a subclass or of the object itself: it may count, or look elsewhere."""
    asked: list[object] = []

    class Counting(Cache):
        def get(self, key: object, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    plain = make_cache(max_bytes="1MB")
    counting = Counting(plain.name)
    found = counting.memoize(name="f")(lambda number: number)
    assert [found(1), found(1)] == [1, 1]
    assert asked == [("memoize", "f", 1)] * 2
    counting.close()
    asked.clear()
    get = plain.get

    def counted(key: object, default: Any = None) -> Any:
        asked.append(key)
        return get(key, default)

    monkeypatch.setattr(plain, "get", counted)
    again = plain.memoize(name="f")(lambda number: number)
    assert again(1) == 1
    assert asked == [("memoize", "f", 1)]
    assert "<lambda>" in repr(again)


@pytest.mark.parametrize("count", range(17))
def test_memoize_makes_one_key_of_any_number_of_arguments(cache: Cache, count: int) -> None:
    """Packed in place or from a tuple, with what stands for the parameters that were left out."""
    parameters = ", ".join(f"p{number}={number}" for number in range(count))
    kinds = ("text", 7, -1.5, None, b"bytes", True, 1 << 70, ("nested",))
    for name in ("f", "n" * 300):
        memoized = cache.memoize(name=name)(eval(f"lambda {parameters}: object"))
        for given in range(count + 1):
            args = [kinds[number % len(kinds)] for number in range(given)]
            key = memoized.cache_key(*args)
            cache.set(key, f"{name} {given}")
            assert memoized(*args) == f"{name} {given}"
            cache.delete(key)


def test_memoize_refuses_a_name_that_can_be_no_key(cache: Cache) -> None:
    with pytest.raises(SerializationError, match=r"cannot use name: .*surrogate"):
        cache.memoize(name="\ud800")(lambda: 1)


def test_memoize_without_parentheses_says_so(cache: Cache) -> None:
    with pytest.raises(TypeError, match=r"@cache\.memoize\(\)"):

        @cache.memoize
        def function() -> None: ...


# --- threads --------------------------------------------------------------------------------------------------------
@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` to `work(count - 1)` at once; what one of them raises is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("eager_switching")
def test_threads_lose_no_increment(cache: Cache) -> None:
    rounds = 3_000 if is_compiled() else 60

    def work(number: int) -> None:
        for _ in range(rounds):
            cache.incr("total", initial=0)
            cache.incr(("own", number % 4), 2, initial=0)

    in_threads(8, work)
    assert cache["total"] == 8 * rounds
    assert [cache[("own", number)] for number in range(4)] == [4 * rounds] * 4
    assert cache.stats().sets == 16 * rounds


@pytest.mark.usefixtures("eager_switching")
def test_threads_read_whole_values_only(cache: Cache) -> None:
    rounds = 1_500 if is_compiled() else 40
    extra: list[int] = []
    most = min(room(cache) // 8, 3_000)

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(rounds):
            key = chance.randrange(5)
            value = cache.get(key)
            assert value is None or (value[0] == key and len(set(value[1])) <= 1), value
            match chance.randrange(4):
                case 0:
                    cache.set(key, (key, bytes([chance.randrange(256)]) * chance.randrange(most)))
                case 1:
                    cache.delete(key)
                case 2:
                    cache.touch(key, 60)
                case 3:
                    cache.get_many([0, 1])
                    cache.gets(key)
                    extra.append(3)

    in_threads(8, work)
    assert cache.check() == []
    stats = cache.stats()
    assert stats.hits + stats.misses == 8 * rounds + sum(extra)


@pytest.mark.usefixtures("eager_switching")
def test_only_one_thread_pops_an_entry(cache: Cache) -> None:
    rounds = 300 if is_compiled() else 20
    popped: list[int] = []

    def work(number: int) -> None:
        for turn in range(rounds):
            cache.add(turn % 3, number)
            if cache.pop(turn % 3, None) is not None:
                popped.append(1)

    in_threads(8, work)
    stats = cache.stats()
    assert len(popped) == stats.deletes
    assert stats.sets == stats.deletes + stats.entries


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_close_and_open_beside_others(cache: Cache) -> None:
    def work(number: int) -> None:
        for turn in range(20):
            with Cache(cache.name) as own:
                own.set(number % 4, turn)
            cache.get(number % 4)

    in_threads(8, work)
    assert cache.stats().processes == 1
    assert len(cache) == 4


@pytest.mark.skipif(not is_compiled(), reason="uncompiled, every operation has a request of its own")
def test_a_finalizer_within_an_operation_gets_no_memory_that_is_in_use(cache: Cache) -> None:
    """Where a large value is let go of, memory is made, and Python before 3.12 may collect there."""
    room: int = cache._attachment.geometry.max_entry_bytes
    cache.set("large", ["x" * min(3 * 2**20, room // 2)])
    cache.set("key", ["value" * 100])
    found: list[Any] = []

    def collected(phase: str, _: object) -> None:
        if phase == "stop":
            found.append(cache.get("key"))

    gc.callbacks.append(collected)
    try:
        for threshold in range(1, 12):
            gc.collect()
            gc.set_threshold(threshold, 100, 100)
            list(cache.values())
            gc.set_threshold(0)
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(700, 10, 10)
    assert found
    assert all(each == ["value" * 100] for each in found)


def test_every_public_method_tells_its_signature(cache: Cache) -> None:
    for name, method in inspect.getmembers(Cache, callable):
        if not name.startswith("_"):
            assert "self" in inspect.signature(method).parameters or inspect.ismethod(method), name
    assert list(inspect.signature(cache.get).parameters) == ["key", "default"]


def test_a_cache_has_no_public_name_but_those_of_the_contract(cache: Cache) -> None:
    """So that a subclass may use any other name for its own."""
    assert {name for name in dir(cache) if not name.startswith("_")} == {
        *("add", "attach", "batch", "cas", "check", "clear", "close", "decr", "default_ttl", "delete", "delete_many"),
        *("from_env", "get", "get_many", "get_or_set", "gets", "incr", "info", "items", "keys", "max_bytes"),
        *("max_entries", "memoize", "name", "pop", "purge", "repair", "replace", "set", "set_many", "stats", "touch"),
        *("ttl", "unlink", "values"),
    }
