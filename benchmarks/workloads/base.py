"""What a workload is: which stores it needs, which peers can take part, and what it measures in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from benchmarks.loops import Bench, quantile
from benchmarks.peers import Peer


class Figure(NamedTuple):
    """One number, of one peer in one round."""

    metric: str
    unit: str  # ns, µs, ms, bytes: less is better; ops/s, items, %: more is
    value: float


@dataclass(frozen=True)
class Scale:
    """How much is done. The figures of a quick run are of the same things, only noisier and of smaller stores."""

    name: str
    rounds: int
    seconds: float  # of one figure that is a mean, in one round
    span: float  # seconds of one figure that is about a stretch of time
    draws: int  # keys in a prepared list
    entries: int  # of small values
    pressure: int  # entries that fit, where four times as many are asked for
    max_bytes: int  # of the store that is filled
    growth: tuple[int, ...]  # entries
    paced: int  # entries


QUICK = Scale("quick", 3, 0.004, 0.08, 10_000, 2_000, 8_192, 24 << 20, (10**3, 10**4, 10**5), 20_000)
FULL = Scale(
    *("full", 11, 0.05, 0.5, 100_000, 10_000, 32_768, 256 << 20, (10**3, 10**4, 10**5, 10**6, 10**7), 1_000_000)
)


class Room(NamedTuple):
    """A store that a workload needs."""

    kind: str = "str 20"
    entries: int = 0
    max_bytes: int | None = None
    about: int | None = None
    ttl: int | None = None
    rounds: int | None = None  # fewer than the scale's
    together: bool = True  # peers in turns; else each has its rounds by itself, where memory is not enough for all


class Workload:
    """Made anew in the process of every peer."""

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("get", "set")
    heavy: ClassVar[bool] = True  # too much for slow peers in a quick run
    yardsticks: ClassVar[bool] = False  # whether the machine is measured as well

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def rooms(self) -> list[Room]:
        raise NotImplementedError

    def takes(self, peer: type[Peer], room: Room) -> bool:
        """Whether a peer can do this."""
        return (
            (self.yardsticks or not peer.yardstick)
            and (not peer.only_in or self.name in peer.only_in)
            and all(need in peer.operations for need in self.needs)
            and room.kind in peer.kinds
            and not (peer.slow and self.scale.name == "quick" and (self.heavy or room.kind != "str 20"))
        )

    def prepare(self, bench: Bench) -> None:
        raise NotImplementedError

    def round(self, bench: Bench, number: int) -> list[Figure]:
        raise NotImplementedError

    def conclude(self, figures: dict[str, dict[str, list[float]]]) -> dict[str, list[Figure]]:
        """What follows from all figures, by metric, peer and round: by peer, one for each round."""
        return {}


def tails(metric: str, ordered: Sequence[float]) -> list[Figure]:
    """p99 and p99.9."""
    return [Figure(f"{metric}, {name}", "ns", quantile(ordered, share)) for name, share in TAILS.items()]


TAILS = {"p99": 0.99, "p99.9": 0.999}
