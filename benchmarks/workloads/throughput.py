"""How much several processes get done together, and what a cache does under pressure."""

from __future__ import annotations

from benchmarks import data
from benchmarks.loops import ASIDE, MIXED, Bench, chunked
from benchmarks.peers import TTL, Peer
from benchmarks.workloads.base import Figure, Room, Workload

INDEPENDENT = ("dict", "dict+msgpack")  # take part with a store in each process: what the cores can do


def deleting(bench: Bench) -> str:
    """The operation that stands for a delete: where there is none, a look-up, which is less work."""
    return next(operation for operation in ("delete", "miss", "get") if bench.can(operation))


class _Together(Workload):
    processes: tuple[int, ...]
    label: str

    @classmethod
    def metric(cls, count: int) -> str:
        """How the figure of this many processes is called."""
        return f"{cls.label}, {count} process{'es' * (count > 1)}"

    def plan(self, bench: Bench, number: int) -> list[tuple[int, str]]:
        raise NotImplementedError

    def rooms(self) -> list[Room]:
        return [Room("1 KiB", self.scale.entries)]

    def prepare(self, bench: Bench) -> None:
        bench.fill(bench.to_keys(data.keys(bench.store.entries)))
        self.plans = []
        for number in range(max(self.processes)):
            operations, keys = zip(*self.plan(bench, number), strict=True)
            self.plans.append(chunked(list(zip(operations, bench.to_keys(keys), strict=True))))

    def round(self, bench: Bench, number: int) -> list[Figure]:
        figures = []
        shared = bench.peer.does.shared or bench.peer.name in INDEPENDENT
        for count in self.processes if shared else self.processes[:1]:
            rates = bench.together(count, self.work)
            figures.append(Figure(self.metric(count), "ops/s", sum(rates)))
        return figures

    def work(self, bench: Bench, number: int) -> float:
        loop = bench.loop(MIXED, get="get", set="set", delete=deleting(bench))
        return float(loop(self.plans[number], bench.value, self.scale.span))


class Mix(_Together):
    """80 % get, 15 % set, 5 % delete, on keys by Zipf."""

    name = "mix"
    title = "80 % get, 15 % set, 5 % delete of 1 KiB by several processes"
    label = "80/15/5 of 1 KiB"
    processes = (1, 2, 4, 8)

    def plan(self, bench: Bench, number: int) -> list[tuple[int, str]]:
        return data.mix(data.keys(bench.store.entries), self.scale.draws, number)


class Hot(_Together):
    """95 % get, 5 % set of one key."""

    name = "hot"
    title = "One hot key, by several processes"
    label = "hot key of 1 KiB"
    processes = (1, 2, 4)

    def plan(self, bench: Bench, number: int) -> list[tuple[int, str]]:
        return [(int(position % 20 == number), data.key(0)) for position in range(2000)]


class _Aside(Workload):
    """Get, and on a miss set."""

    set = "set"

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and peer.does.evicts

    def prepare(self, bench: Bench) -> None:
        self.keys = chunked(bench.to_keys(self.asked_for()))

    def asked_for(self) -> list[str]:
        raise NotImplementedError

    def run(self, bench: Bench, seconds: float) -> tuple[float, float, int]:
        """Operations a second, the share of hits, and how many operations that were."""
        loop = bench.loop(ASIDE, get="miss" if bench.can("miss") else "get", set=self.set)
        rate, share, done = loop(self.keys, bench.value, seconds)
        turn = done // len(self.keys[0]) % len(self.keys)
        self.keys = self.keys[turn:] + self.keys[:turn]  # the next round goes on from there
        return float(rate), float(share), int(done)


class Pressure(_Aside):
    """Four times as many keys as fit."""

    name = "pressure"
    title = "A working set four times what fits: get, and on a miss set"

    def rooms(self) -> list[Room]:
        # Room for the entries of those bounded in bytes: value, key, and what an entry takes besides.
        return [Room("1 KiB", self.scale.pressure, about=self.scale.pressure * 1200)]

    def asked_for(self) -> list[str]:
        return data.zipf(data.keys(4 * self.scale.pressure), 16 * self.scale.pressure)

    def prepare(self, bench: Bench) -> None:
        super().prepare(bench)
        bench.fill([key for chunk in self.keys for key in chunk][-bench.store.entries :])  # as after a while

    def round(self, bench: Bench, number: int) -> list[Figure]:
        rate, share, _ = self.run(bench, self.scale.span)
        return [Figure("eviction pressure", "ops/s", rate), Figure("eviction pressure, hits", "%", 100 * share)]


class Expiry(_Aside):
    """Everything lives for a second, so that much of what is found is gone again."""

    name = "expiry"
    title = "Entries that live for a second: get, and on a miss set"
    needs = ("get", "expire")
    set = "expire"

    def rooms(self) -> list[Room]:
        return [Room("str 20", self.scale.draws * 10, ttl=TTL, rounds=max(1, self.scale.rounds // 3))]

    def asked_for(self) -> list[str]:
        # One after the other, so that the time from one read of a key to the next is about what it lives.
        return data.keys(self.scale.draws * 10)

    def round(self, bench: Bench, number: int) -> list[Figure]:
        rate, share, done = self.run(bench, 1.1 * TTL if self.scale.name == "quick" else 3.5 * TTL)
        figures = [Figure("expiry", "ops/s", rate)]
        if done > sum(map(len, self.keys)):  # or it has met no key a second time, and had no hit to miss
            figures.append(Figure("expiry, hits", "%", 100 * share))
        return figures
