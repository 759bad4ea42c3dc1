"""One process, one operation after the other: how long each takes, and how long the slow ones take."""

from __future__ import annotations

import random
from typing import Any

from benchmarks import data
from benchmarks.loops import Bench
from benchmarks.peers import Peer
from benchmarks.workloads.base import Figure, Room, Scale, Workload, tails

BATCH = 100
SLICES = 5  # of what does the same all the time; what makes room or grows is a mean of all
KINDS = {"str 20": 1, "dict 5": 1, "1 KiB": 1, "64 KiB": 32, "1 MiB": 256}  # and by what there are fewer of them

LARGE = ("64 KiB", "1 MiB")


def rooms(scale: Scale) -> list[Room]:
    return [Room(kind, max(8, scale.entries // fewer)) for kind, fewer in KINDS.items()]


class _Kinds(Workload):
    """On values of every kind. Large ones lie in a store that has seen values of many sizes come and go."""

    heavy = False
    yardsticks = True

    def rooms(self) -> list[Room]:
        return rooms(self.scale)

    def prepare(self, bench: Bench) -> None:
        self.fitting: dict[str, int] = {}
        store = bench.store
        keys = bench.to_keys(data.keys(store.entries))
        bench.fill(keys)
        if store.kind in LARGE and bench.can("set"):
            churn(bench, keys)
        if not bench.peer.yardstick:
            for key in keys[:3] + keys[-3:]:
                if (found := bench.once("get", key)) != bench.value:
                    raise RuntimeError(f"{found!r:.100} is not what was stored")
        self.asked = bench.to_keys(data.zipf(data.keys(store.entries), self.scale.draws))

    def mean(self, bench: Bench, metric: str, operation: str, keys: list[Any]) -> Figure:
        """Of as many operations as take the time that there is."""
        if metric not in self.fitting:
            self.fitting[metric] = bench.fits(operation, keys, self.scale.seconds)
        return Figure(metric, "ns", bench.tight(operation, keys[: self.fitting[metric]], SLICES))

    def slow_ones(self, bench: Bench, metric: str, operation: str, keys: list[Any]) -> list[Figure]:
        return tails(metric, bench.clocked(operation, keys[: max(1000, self.fitting[metric])]))


def churn(bench: Bench, keys: list[Any]) -> None:
    """Three values of other sizes for every key, in no order, then its own again."""
    draw, sizes, value = random.Random(data.SEED), data.sizes_below(len(bench.value)), bench.value
    for _ in range(3):
        for key in draw.sample(keys, len(keys)):
            bench.value = bytes(next(sizes))
            bench.fill([key])
    bench.value = value
    bench.fill(draw.sample(keys, len(keys)))


class Get(_Kinds):
    name = "get"
    title = "Reading"
    needs = ("get",)

    def prepare(self, bench: Bench) -> None:
        super().prepare(bench)
        if bench.store.kind != "str 20":
            return
        self.absent = bench.to_keys(data.zipf(data.keys(bench.store.entries, "none"), self.scale.draws))
        known = data.zipf(data.keys(bench.store.entries), BATCH * 100)
        self.batches = [bench.to_keys(known[first : first + BATCH]) for first in range(0, len(known), BATCH)]
        self.miss = "miss" if bench.can("miss") else "get"

    def round(self, bench: Bench, number: int) -> list[Figure]:
        kind = bench.store.kind
        figures = [self.mean(bench, f"get hit, {kind}", "get", self.asked)]
        if kind != "str 20":
            return figures
        figures += self.slow_ones(bench, f"get hit, {kind}", "get", self.asked)
        if bench.can("set"):  # else a look-up stores
            figures.append(self.mean(bench, "get miss", self.miss, self.absent))
            figures += self.slow_ones(bench, "get miss", self.miss, self.absent)
        if bench.can("get_many"):
            figures.append(self.mean(bench, f"get_many of {BATCH}, {kind}", "get_many", self.batches))
        return figures


class Overwrite(_Kinds):
    name = "overwrite"
    title = "Writing what is there"

    def rooms(self) -> list[Room]:
        return [room for room in super().rooms() if self.scale.name == "full" or room.kind not in LARGE]

    def round(self, bench: Bench, number: int) -> list[Figure]:
        kind = bench.store.kind
        figures = [self.mean(bench, f"overwrite, {kind}", "set", self.asked)]
        if kind == "str 20":
            figures += self.slow_ones(bench, f"overwrite, {kind}", "set", self.asked)
        return figures


class Insert(Workload):
    """Into a store with room, and out of it again."""

    name = "insert"
    title = "Writing what is new, and deleting"
    heavy = False
    needs = ()

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and bool({"set", "insert"} & peer.operations.keys())

    def rooms(self) -> list[Room]:
        return [Room("str 20", self.scale.draws)]

    def prepare(self, bench: Bench) -> None:
        self.insert = "insert" if bench.can("insert") else "set"
        keys = bench.to_keys(data.keys(self.scale.draws))
        number = bench.fits(self.insert, keys, self.scale.seconds)
        self.keys = keys[: max(number, min(1000, 50 * number))]
        self.shuffled = random.Random(data.SEED).sample(self.keys, len(self.keys))
        self.empty(bench)

    def empty(self, bench: Bench) -> float:
        if bench.can("delete"):
            return bench.tight("delete", self.shuffled)
        bench.names["clear"]()
        return 0.0

    def round(self, bench: Bench, number: int) -> list[Figure]:
        figures = [Figure("insert, str 20", "ns", bench.tight(self.insert, self.keys))]
        deleted = self.empty(bench)
        figures += tails("insert, str 20", bench.clocked(self.insert, self.keys))
        if not bench.can("delete"):
            self.empty(bench)
            return figures
        return [*figures, Figure("delete", "ns", deleted), *tails("delete", bench.clocked("delete", self.shuffled))]


class Evict(Workload):
    """Into a full store, where something has to go each time."""

    name = "evict"
    title = "Writing what is new where there is no room"
    needs = ()

    def takes(self, peer: type[Peer], room: Room) -> bool:
        writes = bool({"set", "insert"} & peer.operations.keys())
        return super().takes(peer, room) and writes and peer.does.evicts

    def rooms(self) -> list[Room]:
        return [Room("str 20", self.scale.entries, about=self.scale.entries * 256)]

    def prepare(self, bench: Bench) -> None:
        self.insert = "insert" if bench.can("insert") else "set"
        fill_up(bench, self.insert)
        self.number = bench.fits(self.insert, bench.to_keys(data.keys(self.scale.draws, "first")), self.scale.seconds)

    def round(self, bench: Bench, number: int) -> list[Figure]:
        keys = bench.to_keys(data.keys(self.number, f"a{number}"))
        more = bench.to_keys(data.keys(max(1000, self.number), f"b{number}"))
        return [
            Figure("insert with eviction, str 20", "ns", bench.tight(self.insert, keys)),
            *tails("insert with eviction, str 20", bench.clocked(self.insert, more)),
        ]


def fill_up(bench: Bench, insert: str, at_once: int = 1000, most: int = 1000) -> int:
    """Insert until the store grows no more; how many it then holds."""
    before = 0
    for number in range(most):
        bench.tight(insert, bench.to_keys(data.keys(at_once, f"fill{number}")))
        now = bench.peer.entries()
        if now < before + at_once:
            return now
        before = now
    raise RuntimeError(f"holds {before:,} entries and still grows: its bound cannot be reached")


class Memoize(Workload):
    """A call of a decorated function whose result is stored."""

    name = "memoize"
    title = "Calls of a decorated function"
    heavy = False
    needs = ("call",)
    yardsticks = True

    def rooms(self) -> list[Room]:
        return [Room("str 20", self.scale.entries)]

    def prepare(self, bench: Bench) -> None:
        value = bench.value

        def function(key: str) -> Any:
            return value

        bench.names["function"] = bench.peer.memoize(function)
        bench.tight("call", data.keys(bench.store.entries))
        self.asked = data.zipf(data.keys(bench.store.entries), self.scale.draws)
        self.number = bench.fits("call", self.asked, self.scale.seconds)

    def round(self, bench: Bench, number: int) -> list[Figure]:
        asked = self.asked[: self.number]
        return [
            Figure("memoize hit, str 20", "ns", bench.tight("call", asked, SLICES)),
            *tails("memoize hit, str 20", bench.clocked("call", self.asked[: max(1000, self.number)])),
        ]
