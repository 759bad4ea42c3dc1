"""How long the slow requests take: beside writers at full speed, and at a steady rate from a large store."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import data
from benchmarks.loops import PACED, Bench, collector_off, quantile
from benchmarks.peers import Peer
from benchmarks.workloads.base import Figure, Room, Workload
from benchmarks.workloads.capacity import batches

WRITERS = 4
RATE = 30_000  # requests a second
READ_BESIDE = f"get beside {WRITERS} writers, p99.9"
IDLE_BESIDE = f"idle loop beside {WRITERS} writers, p99.9"
PACED_P99 = f"{RATE:,} requests/s, p99"


class Readers(Workload):
    """One process reads while four write at full speed; in turns with an empty loop, which the scheduler delays too."""

    name = "readers"
    title = f"Reading while {WRITERS} processes write at full speed"

    def rooms(self) -> list[Room]:
        return [Room("str 20", self.scale.entries)]

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and peer.does.shared

    def prepare(self, bench: Bench) -> None:
        bench.fill(bench.to_keys(data.keys(bench.store.entries)))
        self.asked = bench.to_keys(data.zipf(data.keys(bench.store.entries), 1000))

    def round(self, bench: Bench, number: int) -> list[Figure]:
        times, idle = bench.together(1 + WRITERS, self.work)[0]
        return [
            Figure(READ_BESIDE, "ns", quantile(sorted(times), 0.999)),
            Figure(IDLE_BESIDE, "ns", quantile(sorted(idle), 0.999)),
        ]

    def work(self, bench: Bench, number: int) -> tuple[list[float], list[float]]:
        times: list[float] = []
        idle: list[float] = []
        end = time.perf_counter() + 2 * self.scale.span
        while time.perf_counter() < end:
            if number == 0:
                times += bench.clocked("get", self.asked)
                idle += bench.idle(self.asked)
            else:
                bench.fill(self.asked)
        return times, idle


class Paced(Workload):
    """Requests that come at a fixed rate, whether or not the one before is answered: waiting counts."""

    name = "paced"
    title = f"{RATE:,} requests a second of values of 1 KiB, 80 % get, 15 % set, 5 % delete"
    needs = ("get", "set", "delete")
    peers = ("shmcache", "dict+msgpack", "lmdb", "uWSGI", "memcached pylibmc", "Redis")

    def rooms(self) -> list[Room]:
        count = self.scale.paced
        return [Room("1 KiB", count, max_bytes=count * 2148, rounds=1, together=False)]  # a million in 2 GiB

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and peer.name in self.peers

    def prepare(self, bench: Bench) -> None:
        for keys in batches(bench.store.entries):
            bench.fill(bench.to_keys(keys))
        seconds = 20 if self.scale.name == "full" else 1
        plan = data.mix(data.keys(bench.store.entries), RATE * seconds, data.SEED)
        keys = bench.to_keys(key for _, key in plan)
        self.plan = [(operation, key) for (operation, _), key in zip(plan, keys, strict=True)]

    def round(self, bench: Bench, number: int) -> list[Figure]:
        times: list[Any] = []
        loop = bench.loop(PACED, get="get", set="set", delete="delete")
        with collector_off():
            loop(self.plan, bench.value, 1_000_000_000 // RATE, times.append)
        times.sort()
        return [
            Figure(f"{RATE:,} requests/s, p50", "ns", quantile(times, 0.5)),
            Figure(PACED_P99, "ns", quantile(times, 0.99)),
            Figure(f"{RATE:,} requests/s, p99.9", "ns", quantile(times, 0.999)),
        ]
