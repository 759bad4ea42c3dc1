"""The order of eviction in a cache too large for an exact one. (That of a small one: `test_model.py`.)"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator

import pytest

from shmcache import Cache
from shmcache.engine import layout
from tests.conftest import new_name

ENTRIES = layout.EXACT_ORDER_SLOTS + 200


@pytest.fixture
def large() -> Iterator[Cache]:
    with Cache(new_name(), max_bytes="2MB", max_entries=ENTRIES, shards=1) as cache:
        yield cache
        cache.unlink()


def contents(cache: Cache) -> bytes:
    """All of the shard, without the process table, where hits are counted."""
    attachment = cache._attachment
    return bytes(attachment.words[attachment.geometry.region(0).header :])


def test_where_nothing_comes_hits_write_nothing(large: Cache) -> None:
    for number in range(ENTRIES):
        large.set(number, number)
    for number in range(ENTRIES):
        large.get(number)
    before = contents(large)
    for number in range(ENTRIES):
        assert large.get(number) == number
        large.get(number)
    assert contents(large) == before


def test_what_is_used_stays_however_much_comes(large: Cache) -> None:
    for number in range(10 * ENTRIES):
        large.set(number, number)
        large.get("hot", large.get("warm"))
        if number == 0:
            large.set("hot", 1)
            large.set("warm", 1)
        if number % (ENTRIES // 2) == 0:
            assert large.get("warm") == 1
    assert large.get("hot") == 1
    assert large.stats().evictions >= 9 * ENTRIES


def test_an_overwrite_counts_as_use(large: Cache) -> None:
    for number in range(3 * ENTRIES):
        large.set("hot", number)
        large.set(number, number)
    assert large.get("hot") == 3 * ENTRIES - 1


@pytest.mark.parametrize("skew", [0.6, 1.0])
def test_as_many_hits_as_an_exact_order_would_give(large: Cache, skew: float) -> None:
    """Half a point less at most."""
    keys = range(4 * ENTRIES)
    asked = random.Random(1).choices(keys, [1 / (number + 1) ** skew for number in keys], k=15 * ENTRIES)
    order: OrderedDict[int, None] = OrderedDict()
    hits = exact = 0
    for key in asked:
        if key in order:
            exact += 1
            order.move_to_end(key)
        else:
            order[key] = None
            if len(order) > ENTRIES:
                order.popitem(last=False)
        if large.get(key) is None:
            large.set(key, key)
        else:
            hits += 1
    assert exact - hits < 0.005 * len(asked)
    assert large.check() == []
