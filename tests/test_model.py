"""Random operations on a cache and on a model so simple that it is obviously right must agree after every step."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmcache import DEFAULT, Cache, ValueTooLarge, is_compiled
from tests.conftest import Clock, new_name

SETTINGS = settings(
    max_examples=150 if is_compiled() else 100,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

keys = st.sampled_from(["a", "b", "c", b"a", 1, 2, (1, "x"), True])
values = st.one_of(st.none(), st.integers(-5, 300), st.text(max_size=5), st.lists(st.integers(), max_size=3))
ttls = st.one_of(st.just(DEFAULT), st.none(), st.sampled_from([0.5, 1, 3, 60, 150, 1000]))
deltas = st.integers(-200, 200)

NEVER = float("inf")


class Model:
    """A dict in order of use, the least recent first, with expiries, that holds no more than so many entries."""

    def __init__(self, clock: Clock, max_entries: int, default_ttl: float | None) -> None:
        self.clock = clock
        self.max_entries = max_entries
        self.default_ttl = default_ttl
        self.entries: OrderedDict[Any, tuple[Any, float, int]] = OrderedDict()
        self.writes = 0

    def live(self) -> OrderedDict[Any, tuple[Any, float, int]]:
        for key in [key for key, (_, expiry, _) in self.entries.items() if expiry <= self.clock.now]:
            del self.entries[key]
        return self.entries

    def has(self, key: Any) -> bool:
        return key in self.live()

    def read(self, key: Any) -> tuple[Any, float, int]:
        entry = self.live()[key]
        self.entries.move_to_end(key)
        return entry

    def expiry(self, ttl: Any) -> float:
        ttl = self.default_ttl if ttl is DEFAULT else ttl
        return NEVER if ttl is None else self.clock.now + int(ttl * 1e9)

    def write(self, key: Any, value: Any, expiry: float) -> None:
        if not self.has(key) and len(self.entries) == self.max_entries:
            self.entries.popitem(last=False)
        self.writes += 1
        self.entries[key] = (value, expiry, self.writes)
        self.entries.move_to_end(key)


def mine(key: Any) -> Any:
    """A key of the model: Python's dict takes 1 and True for one, the cache does not."""
    return (type(key).__name__, key)


class LruMachine(RuleBasedStateMachine):
    """One shard, bounded by its entries: the cache and the model agree in everything, eviction order included."""

    @initialize(
        max_entries=st.integers(1, 6),
        default_ttl=st.sampled_from([None, 2, 100]),
        items=st.lists(st.tuples(keys, values), max_size=6),
    )
    def create(self, max_entries: int, default_ttl: float | None, items: list[tuple[Any, Any]]) -> None:
        self.clock = Clock()
        self.cache = Cache(
            new_name(), max_bytes="128KB", max_entries=max_entries, default_ttl=default_ttl, clock=self.clock
        )
        self.model = Model(self.clock, max_entries, default_ttl)
        self.known: dict[Any, tuple[int | None, int]] = {}
        for key, value in items:
            self.set(key, value, DEFAULT)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.unlink()

    # --- writing
    @rule(key=keys, value=values, ttl=ttls)
    def set(self, key: Any, value: Any, ttl: Any) -> None:
        self.cache.set(key, value, ttl)
        self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(key=keys, value=values, ttl=ttls)
    def add(self, key: Any, value: Any, ttl: Any) -> None:
        missing = not self.model.has(mine(key))
        assert self.cache.add(key, value, ttl) is missing
        if missing:
            self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(key=keys, value=values, ttl=ttls)
    def replace(self, key: Any, value: Any, ttl: Any) -> None:
        present = self.model.has(mine(key))
        assert self.cache.replace(key, value, ttl) is present
        if present:
            self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(key=keys)
    def delete(self, key: Any) -> None:
        present = self.model.has(mine(key))
        assert self.cache.delete(key) is present
        self.model.entries.pop(mine(key), None)

    @rule(key=keys)
    def pop(self, key: Any) -> None:
        expected = self.model.entries.pop(mine(key))[0] if self.model.has(mine(key)) else "missing"
        assert self.cache.pop(key, "missing") == expected

    @rule(key=keys, ttl=ttls)
    def touch(self, key: Any, ttl: Any) -> None:
        present = self.model.has(mine(key))
        assert self.cache.touch(key, ttl) is present
        if present:
            value, _, _ = self.model.read(mine(key))
            self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(key=keys, delta=deltas, initial=st.one_of(st.none(), deltas), ttl=ttls)
    def incr(self, key: Any, delta: int, initial: int | None, ttl: Any) -> None:
        expiry = self.model.expiry(ttl)
        start: Any = initial
        if self.model.has(mine(key)):
            start, expiry, _ = self.model.entries[mine(key)]
            if type(start) is not int:
                with pytest.raises(TypeError):
                    self.cache.incr(key, delta, initial, ttl)
                return
        elif initial is None:
            with pytest.raises(KeyError):
                self.cache.incr(key, delta, initial, ttl)
            return
        assert self.cache.incr(key, delta, initial, ttl) == start + delta
        self.model.write(mine(key), start + delta, expiry)

    @rule(key=keys)
    def gets(self, key: Any) -> None:
        value, version = self.cache.gets(key, "missing")
        if self.model.has(mine(key)):
            expected, _, write = self.model.read(mine(key))
            assert value == expected
            assert version is not None
        else:
            assert (value, version) == ("missing", None)
            write = 0
        self.known[mine(key)] = (version, write)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), value=values, ttl=ttls)
    def cas(self, data: st.DataObject, value: Any, ttl: Any) -> None:
        key, (version, write) = data.draw(st.sampled_from(list(self.known.items())))
        now = self.model.entries[key][2] if self.model.has(key) else 0
        assert self.cache.cas(key[1], value, version, ttl) is (now == write)
        if now == write:
            self.model.write(key, value, self.model.expiry(ttl))

    @rule(items=st.lists(st.tuples(keys, values), max_size=4), ttl=ttls)
    def set_many(self, items: list[tuple[Any, Any]], ttl: Any) -> None:
        mapping = dict(items)
        self.cache.set_many(mapping, ttl)
        for key, value in mapping.items():
            self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(several=st.lists(keys, max_size=4))
    def delete_many(self, several: list[Any]) -> None:
        gone = {mine(key) for key in several} & set(self.model.live())
        assert self.cache.delete_many(several) == len(gone)
        for key in gone:
            del self.model.entries[key]

    @rule(key=keys, value=values, ttl=ttls)
    def get_or_set(self, key: Any, value: Any, ttl: Any) -> None:
        found = self.cache.get_or_set(key, lambda: value, ttl)
        if self.model.has(mine(key)):
            assert found == self.model.read(mine(key))[0]
        else:
            assert found == value
            self.model.write(mine(key), value, self.model.expiry(ttl))

    @rule(reads=st.lists(keys, max_size=2), key=keys, value=values, ttl=ttls, more=st.lists(keys, max_size=2))
    def batch(self, reads: list[Any], key: Any, value: Any, ttl: Any, more: list[Any]) -> None:
        with self.cache.batch() as batch:
            before = [batch.get(each, "missing") for each in reads]
            batch.set(key, value, ttl)
            after = [batch.get(each, "missing") for each in more]
            deleted = batch.delete(key)
        for each, got in zip(reads, before, strict=True):
            assert got.value == (self.model.read(mine(each))[0] if self.model.has(mine(each)) else "missing")
        self.model.write(mine(key), value, self.model.expiry(ttl))
        for each, got in zip(more, after, strict=True):
            assert got.value == (self.model.read(mine(each))[0] if self.model.has(mine(each)) else "missing")
        assert deleted.value is self.model.has(mine(key))
        self.model.entries.pop(mine(key), None)

    # --- reading
    @rule(key=keys)
    def get(self, key: Any) -> None:
        expected = self.model.read(mine(key))[0] if self.model.has(mine(key)) else "missing"
        found = self.cache.get(key, "missing")
        assert found == expected
        assert type(found) is type(expected)

    @rule(several=st.lists(st.sampled_from(["a", "b", "c", 1, 2]), max_size=4))
    def get_many(self, several: list[Any]) -> None:
        expected = {}
        for key in several:
            if self.model.has(mine(key)):
                expected[key] = self.model.read(mine(key))[0]
        assert self.cache.get_many(several) == expected

    @rule(key=keys)
    def contains(self, key: Any) -> None:
        present = self.model.has(mine(key))
        assert (key in self.cache) is present
        if present:
            self.model.read(mine(key))

    @rule(key=keys)
    def ttl(self, key: Any) -> None:
        if not self.model.has(mine(key)):
            with pytest.raises(KeyError):
                self.cache.ttl(key)
            return
        _, expiry, _ = self.model.read(mine(key))
        assert self.cache.ttl(key) == (None if expiry == NEVER else (expiry - self.clock.now) / 1e9)

    # --- everything else
    @rule(seconds=st.sampled_from([1e-9, 0.4, 1, 2.5, 59, 127, 500, 1e5]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def purge(self) -> None:
        before = self.cache.stats().entries
        gone = self.cache.purge()
        assert before - gone == len(self.model.live()) == self.cache.stats().entries

    @rule()
    def count(self) -> None:
        assert len(self.cache) == len(self.model.live())

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.entries.clear()

    @rule()
    def repair(self) -> None:
        assert self.cache.repair() == []

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        live = self.model.live()
        # `len` would remove the expired, and nothing would be left for eviction to find.
        assert {mine(key): value for key, value in self.cache.items()} == {key: entry[0] for key, entry in live.items()}
        assert sum(1 for _ in self.cache) == len(live) <= self.cache.stats().entries <= self.model.max_entries
        for (_, key), (_, expiry, _) in live.items():
            assert self.cache.info(key).ttl == (None if expiry == NEVER else (expiry - self.clock.now) / 1e9)
        assert self.cache.check() == []


class PressureMachine(RuleBasedStateMachine):
    """Several shards and too little memory: what is read is what was written last, or nothing."""

    numbers = st.integers(0, 60)
    sizes = st.one_of(st.integers(0, 300), st.integers(0, 3_000), st.integers(0, 12_000))

    @initialize(shards=st.sampled_from([1, 2, 4]), max_entries=st.sampled_from([5, 30, 60]))
    def create(self, shards: int, max_entries: int) -> None:
        self.clock = Clock()
        self.cache = Cache(
            new_name(), max_bytes=32_768 + 16_384 * shards, max_entries=max_entries, shards=shards, clock=self.clock
        )
        self.written: dict[int, tuple[bytes, float]] = {}
        self.turns = 0

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.unlink()

    def value(self, size: int) -> bytes:
        self.turns += 1
        return random.Random(self.turns).randbytes(size)

    def expiry(self, ttl: float | None) -> float:
        return NEVER if ttl is None else self.clock.now + int(ttl * 1e9)

    def is_right(self, key: int, found: Any) -> bool:
        value, expiry = self.written.get(key, (None, 0.0))
        return found is None or (found == value and expiry > self.clock.now)

    @rule(key=numbers, size=sizes, ttl=st.sampled_from([None, 1, 100]))
    def set(self, key: int, size: int, ttl: float | None) -> None:
        value = self.value(size)
        try:
            self.cache.set(key, value, ttl)
        except ValueTooLarge:
            assert size + 20 > self.cache._attachment.geometry.max_entry_bytes
        else:
            self.written[key] = (value, self.expiry(ttl))
            assert self.cache.get(key) == value

    @rule(first=numbers, count=st.integers(1, 20), size=st.integers(0, 600), ttl=st.sampled_from([None, 1, 100]))
    def set_many(self, first: int, count: int, size: int, ttl: float | None) -> None:
        items = {key % 61: self.value(size) for key in range(first, first + count)}
        self.cache.set_many(items, ttl)
        for key, value in items.items():
            self.written[key] = (value, self.expiry(ttl))
        found = self.cache.get_many(items)
        assert key in found
        assert all(self.is_right(key, value) for key, value in found.items())

    @rule(key=numbers, size=sizes)
    def batch(self, key: int, size: int) -> None:
        value = self.value(min(size, 1_000))
        with self.cache.batch() as batch:
            first = batch.get(key)
            batch.set(key, value)
            second = batch.get(key)
        assert self.is_right(key, first.value)
        assert second.value == value
        self.written[key] = (value, NEVER)

    @rule(key=numbers, size=sizes)
    def add(self, key: int, size: int) -> None:
        value = self.value(min(size, 3_000))
        if self.cache.add(key, value):
            self.written[key] = (value, NEVER)
        assert self.cache.get(key) == self.written[key][0]

    @rule(key=numbers)
    def get(self, key: int) -> None:
        assert self.is_right(key, self.cache.get(key))

    @rule(key=numbers)
    def pop(self, key: int) -> None:
        assert self.is_right(key, self.cache.pop(key, None))
        self.written.pop(key, None)
        assert key not in self.cache

    @rule(key=numbers)
    def touch(self, key: int) -> None:
        if self.cache.touch(key, 50):
            self.written[key] = (self.written[key][0], self.expiry(50))
            assert self.cache.ttl(key) == 50.0

    @rule(several=st.lists(numbers, max_size=20))
    def delete_many(self, several: list[int]) -> None:
        self.cache.delete_many(several)
        for key in several:
            self.written.pop(key, None)
            assert key not in self.cache

    @rule(seconds=st.sampled_from([0.5, 2, 99, 1000]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def purge(self) -> None:
        self.cache.purge()
        assert len(self.cache) == self.cache.stats().entries == sum(1 for _ in self.cache)

    @rule()
    def repair(self) -> None:
        before = dict(self.cache.items())
        assert self.cache.repair() == []
        assert dict(self.cache.items()) == before

    @precondition(lambda self: self.turns % 7 == 6)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.written.clear()

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        items = list(self.cache.items())
        assert len({key for key, _ in items}) == len(items)
        assert all(self.is_right(key, value) for key, value in items)
        stats = self.cache.stats()
        assert len(items) <= stats.entries <= self.cache.max_entries
        assert self.cache.check() == []


TestLru = LruMachine.TestCase
TestLru.settings = SETTINGS
TestPressure = PressureMachine.TestCase
TestPressure.settings = SETTINGS
