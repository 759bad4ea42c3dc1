"""Keys that are tuples have the bytes that `encode_key` says, whichever way they were packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmcache import Cache, SerializationError
from shmcache.codec import encode_key

PARTS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()


@pytest.fixture
def cache(name: str) -> Iterator[Cache]:
    with Cache(name, max_bytes="1MB", max_entries=100) as cache:
        yield cache
        assert cache.check() == []
        cache.unlink()


def keep(cache: Cache, key: tuple[Any, ...]) -> None:
    """Listing the keys raises for one that has other bytes than those of `encode_key`."""
    cache.clear()
    cache.set(key, "value")
    assert cache.get(key) == "value"
    [found] = cache.keys()
    assert found == key
    assert [*map(type, found)] == [*map(type, key)]
    assert cache.info(key).key_bytes == len(encode_key(key))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.lists(PARTS | st.tuples(PARTS), max_size=18).map(tuple))
def test_any_tuple(cache: Cache, key: tuple[Any, ...]) -> None:
    keep(cache, key)


EDGES = [
    sign * (2**power + more) for power in (5, 7, 8, 15, 16, 31, 32, 63, 64) for more in (-1, 0, 1) for sign in (1, -1)
]


@pytest.mark.parametrize("part", [*EDGES, 0.0, 1.5, float("inf"), True, False, None], ids=repr)
def test_numbers(cache: Cache, part: object) -> None:
    keep(cache, (part,))
    keep(cache, ("before", part, "after"))


@pytest.mark.parametrize("size", [*range(18), 31, 32, 33, 124, 125, 126, 239, 240, *range(244, 258), 1000])
def test_sizes(cache: Cache, size: int) -> None:
    for text in ("x" * size, "\xe9" * (size // 2) + "x" * (size % 2), b"x" * size):
        keep(cache, (text,))
        keep(cache, (text, 1))
        for last in (b"b", "b", b"", "", 98):  # where there is room for some of it
            keep(cache, (text, last))
    keep(cache, (None,) * size)
    keep(cache, (2**40,) * size)


def test_many_at_once(cache: Cache) -> None:
    cache.set_many({("a", 1): 1, ("b", 2): 2})
    assert cache.get_many([("a", 1), ("b", 2), ("c", 3)]) == {("a", 1): 1, ("b", 2): 2}


def test_negative_zero_is_zero(cache: Cache) -> None:
    cache.set((0.0,), "value")
    assert cache.get((-0.0,)) == "value"


def test_types_are_told_apart(cache: Cache) -> None:
    same = [(1,), (1.0,), (True,), ("1",), (b"1",), ((1,),)]
    for number, key in enumerate(same):
        cache.set(key, number)
    assert [cache.get(key) for key in same] == [*range(6)]


class Text(str):
    """Equals a str, and is none."""


@pytest.mark.parametrize(
    "part", [float("nan"), "\ud800", [], Text("text")], ids=["nan", "surrogate", "list", "subclass"]
)
def test_what_is_no_key_is_refused(cache: Cache, part: object) -> None:
    with pytest.raises(SerializationError, match=r"cannot use key\[1\]: "):
        cache.get(("before", part))
