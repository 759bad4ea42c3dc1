"""What shmcache is to reach, as data: each target is checked against the figures of the same run, met or missed."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Results
from benchmarks.peers import Shmcache, ShmcachePure
from benchmarks.workloads.capacity import SLOWDOWN
from benchmarks.workloads.tails import IDLE_BESIDE, PACED_P99, READ_BESIDE
from benchmarks.workloads.throughput import Mix


@dataclass(frozen=True)
class Target:
    """A figure, or its ratio to another one, and the limit for it."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    times: tuple[str, str] | None = None  # metric and peer that the limit is a multiple of
    plus: tuple[str, str] | None = None  # metric and peer whose figure is added to the limit
    peer: str = Shmcache.name

    @property
    def limit(self) -> float:
        limit = self.at_most if self.at_most is not None else self.at_least
        assert limit is not None
        return limit


@dataclass(frozen=True)
class Verdict:
    """What came of a target."""

    target: Target
    value: float | None  # in units of the limit; None if a figure is missing
    limit: float

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.target.at_most is not None else self.value >= self.limit

    @property
    def missed_by(self) -> float:
        """How far off, as a share of the limit."""
        assert self.value is not None
        return abs(self.value / self.limit - 1)


def judge(results: Results, target: Target) -> Verdict:
    limit = target.limit
    if target.times is not None:
        return Verdict(target, results.ratio((target.metric, target.peer), target.times), limit)
    value = results.median(target.metric, target.peer)
    if target.plus is not None:
        more = results.median(*target.plus)
        if more is None:
            value = None
        limit += more or 0.0
    return Verdict(target, value, limit)


GET, GET_1K, GET_DICT = "get hit, str 20", "get hit, 1 KiB", "get hit, dict 5"
OVERWRITE, EVICT, MEMOIZE = "overwrite, str 20", "insert with eviction, str 20", "memoize hit, str 20"
US = 1000  # ns
mix = Mix.metric

TARGETS = (
    Target(GET, at_most=0.9, times=(GET, "dict+msgpack")),
    Target(GET, at_most=0.6, times=(GET, "warp_cache shared")),
    Target(GET, at_most=0.35, times=(GET, "uWSGI")),
    Target(GET, at_most=0.12, times=(GET, "lmdb")),
    Target(GET, at_most=0.1, times=(GET, "cachetools.TTLCache")),
    Target(GET_1K, at_most=1.0, times=(GET_1K, "dict+msgpack")),
    Target(GET_1K, at_most=0.7, times=(GET_1K, "warp_cache shared")),
    Target(GET_DICT, at_most=1.15, times=(GET_DICT, "dict+msgpack")),
    Target(GET_DICT, at_most=0.4, times=(GET_DICT, "lmdb")),
    # 70 % of the bandwidth
    Target("get hit, 64 KiB", at_most=1 / 0.7, times=("get hit, 64 KiB", "bytes(memoryview)")),
    Target("get hit, 1 MiB", at_most=1 / 0.7, times=("get hit, 1 MiB", "bytes(memoryview)")),
    Target("get miss", at_most=1.0, times=(GET, Shmcache.name)),
    Target(OVERWRITE, at_most=2.5, times=(GET, Shmcache.name)),
    Target(OVERWRITE, at_most=0.8, times=(OVERWRITE, "warp_cache shared")),
    Target(OVERWRITE, at_most=0.2, times=(OVERWRITE, "lmdb")),
    Target(EVICT, at_most=4.0, times=(GET, Shmcache.name)),
    Target(EVICT, at_most=0.3, times=(EVICT, "uWSGI")),
    Target(f"{EVICT}, p99.9", at_most=6 * US),
    Target(MEMOIZE, at_most=1.0, times=(MEMOIZE, "warp_cache shared")),
    Target(mix(1), at_least=1.3, times=(mix(1), "warp_cache shared")),
    Target(mix(1), at_least=1.3, times=(mix(1), "uWSGI")),
    *(Target(mix(count), at_least=1.8, times=(mix(count), "warp_cache shared")) for count in (2, 4, 8)),
    *(Target(mix(count), at_least=50.0, times=(mix(count), "Redis")) for count in (1, 2, 4, 8)),
    *(Target(mix(count), at_least=20.0, times=(mix(count), "memcached pylibmc")) for count in (1, 2, 4, 8)),
    # each of whose processes has a dict of its own
    Target(mix(2), at_least=0.9, times=(mix(2), "dict+msgpack")),
    Target(READ_BESIDE, at_most=20 * US, plus=(IDLE_BESIDE, Shmcache.name)),
    Target("keys and values, of max_bytes", at_least=92.0),
    Target("items", at_least=1.0, times=("items", "memcached pylibmc")),
    Target(SLOWDOWN, at_most=1.5, times=(SLOWDOWN, "dict+msgpack")),
    Target(PACED_P99, at_most=100 * US),
    Target("import, attach, first get", at_most=4.0, times=("import, attach, first get", "lmdb")),
    Target(GET, at_most=15 * US, peer=ShmcachePure.name),
)
