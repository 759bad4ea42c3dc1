"""What fits into how much memory, and what happens as a store grows."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections.abc import Iterator
from typing import Any

from benchmarks import data
from benchmarks.loops import Bench
from benchmarks.peers import Peer
from benchmarks.workloads.base import Figure, Room, Workload
from benchmarks.workloads.latency import SLICES

KEY, VALUE = 50, 1024  # bytes
AT_ONCE = 10_000
BATCH = 100


class Memory(Workload):
    """How many items a bound in bytes holds after values of other sizes have come and gone; else what an item takes."""

    name = "memory"
    title = "Keys of 50 bytes and values of 1 KiB after churn"
    needs = ("set",)

    def rooms(self) -> list[Room]:
        most = self.scale.max_bytes
        # An entry takes its key and value, and in the leanest store some 80 bytes besides.
        return [Room("1 KiB", most // (KEY + VALUE + 80), max_bytes=most, rounds=1, together=False)]

    def prepare(self, bench: Bench) -> None:
        pass

    def round(self, bench: Bench, number: int) -> list[Figure]:
        in_bytes = bench.peer.bounded_in_bytes
        fits = bench.store.entries
        before = bench.peer.memory()
        if in_bytes:
            with contextlib.suppress(*bench.peer.full()):
                if bench.peer.does.evicts:
                    self.churn(bench, 2 * fits)
                self.insert(bench, 10 * fits, 25 * fits // 10)
            items = self.found(bench, 10 * fits, 25 * fits // 10)
            held = items * (KEY + VALUE)
            return [
                Figure("items", "items", items),
                Figure("keys and values, of max_bytes", "%", 100 * held / self.scale.max_bytes),
                Figure("memory taken, of max_bytes", "%", 100 * bench.peer.memory() / self.scale.max_bytes),
                Figure("memory per item", "bytes", bench.peer.memory() / items),
            ]
        self.insert(bench, 0, fits // 2)
        gc.collect()
        # What is reserved at the start is not taken later.
        taken = bench.peer.memory() - (before if bench.peer.grows else 0)
        return [Figure("memory per item", "bytes", taken / bench.peer.entries())]

    def churn(self, bench: Bench, count: int) -> None:
        draw, sizes = random.Random(data.SEED), data.sizes_below(VALUE)
        loop, drop = bench.setter(), bench.can("delete")
        for first in range(0, count, AT_ONCE):
            keys = bench.to_keys(data.long_keys(AT_ONCE, first))
            for key in keys:
                loop([key], bytes(next(sizes)))
            if drop:
                bench.tight("delete", draw.sample(keys, AT_ONCE // 3))

    def found(self, bench: Bench, first: int, count: int) -> int:
        """How many of the keys that were inserted last are there, for some stores keep what is smaller from before."""
        present = 0
        for start in range(first, first + count, BATCH):
            keys = bench.to_keys(data.long_keys(min(BATCH, first + count - start), start))
            if bench.can("get_many"):
                present += len(bench.once("get_many", keys))
            else:
                present += sum(bench.once("get", key) is not None for key in keys)
        return present

    def insert(self, bench: Bench, first: int, count: int) -> None:
        loop = bench.setter()
        for start in range(first, first + count, AT_ONCE):
            for key in bench.to_keys(data.long_keys(min(AT_ONCE, first + count - start), start)):
                loop([key], random.randbytes(VALUE))  # a value of its own, as in life


class Growth(Workload):
    """Reads by chance from ever more entries: what the caches of the processor no longer hold takes longer."""

    name = "growth"
    title = "Reading as the store grows"
    peers = ("shmcache", "dict", "dict+msgpack", "lmdb", "warp_cache shared", "uWSGI")

    def rooms(self) -> list[Room]:
        return [Room("str 20", count, together=count <= 10**6) for count in self.scale.growth]

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and peer.name in self.peers

    def prepare(self, bench: Bench) -> None:
        count = bench.store.entries
        for keys in batches(count):
            bench.fill(bench.to_keys(keys))
        draw = random.Random(data.SEED)
        self.asked = bench.to_keys(data.key(draw.randrange(count)) for _ in range(self.scale.draws))
        bench.tight("get", self.asked)
        find = "miss" if bench.can("miss") else "get"
        if any(bench.once(find, key) is None for key in self.asked[:1000]):
            raise RuntimeError("some of what was stored is gone: these would be misses")

    def round(self, bench: Bench, number: int) -> list[Figure]:
        return [Figure(growth_metric(bench.store.entries), "ns", bench.tight("get", self.asked, SLICES))]

    def conclude(self, figures: dict[str, dict[str, list[float]]]) -> dict[str, list[Figure]]:
        """How many times as long a read takes from the most entries as from a thousand."""
        least, most = (figures.get(growth_metric(count), {}) for count in (self.scale.growth[0], self.scale.growth[-1]))
        return {
            peer: [Figure(SLOWDOWN, "times", many / few) for many, few in zip(most[peer], least[peer], strict=False)]
            for peer in most.keys() & least.keys()
        }


SLOWDOWN = "slower than with 1,000 entries"


def growth_metric(entries: int) -> str:
    return f"get hit by chance, {entries:,} entries"


def batches(count: int) -> Iterator[list[Any]]:
    numbers = iter(range(count))
    while keys := [data.key(number) for number in itertools.islice(numbers, AT_ONCE)]:
        yield keys
