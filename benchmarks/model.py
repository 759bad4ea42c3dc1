"""How throughput grows with cores, by a simulation from costs measured on two, to choose the number of shards by.

Every core does one operation after the other on keys by Zipf's law: look-ups, which take no lock, and changes, which
wait their turn for the lock of their key's shard. What a change writes has mostly been written by another core before,
and costs a transfer of each cache line. `python -m benchmarks.model` prints the table of docs/performance.md.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import click

CORES = (2, 8, 32, 128)
SHARDS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Costs:
    """In ns, of one core by itself; `lines` are what a change writes besides the value. docs/performance.md: whence."""

    get: float = 250
    outside: float = 230  # of a change, without the lock
    inside: float = 360  # with it
    lines: int = 9
    transfer: float = 45  # of a cache line from another core
    changes: float = 0.2  # their share of all operations
    keys: int = 10_000


def operations(costs: Costs, cores: int, shards: int, count: int, seed: int = 1) -> float:
    """Millions a second, of all cores together."""
    rng = random.Random(seed)
    weights = list(accumulate(1 / (rank + 1) for rank in range(costs.keys)))
    shard_of = [rng.randrange(shards) for _ in range(costs.keys)]
    chosen = rng.choices(shard_of, cum_weights=weights, k=count)
    locked_by = [-1] * shards  # the core that had it last
    free_at = [0.0] * shards
    ready = [(rng.random() * costs.get, core) for core in range(cores)]
    heapq.heapify(ready)
    now = 0.0
    for shard in chosen:
        now, core = heapq.heappop(ready)
        if rng.random() >= costs.changes:
            heapq.heappush(ready, (now + costs.get, core))
            continue
        begins = max(now + costs.outside, free_at[shard])
        moved = 0.0 if locked_by[shard] == core else costs.lines * costs.transfer
        free_at[shard] = begins + costs.inside + moved
        locked_by[shard] = core
        heapq.heappush(ready, (free_at[shard], core))
    return count / now * 1000


def table(costs: Costs, cores: Iterable[int] = CORES, shards: Iterable[int] = SHARDS) -> Iterator[list[str]]:
    """A row for each number of cores: how many times what one core does."""
    alone = operations(costs, 1, 1, 20_000)
    for count in cores:
        yield [str(count), *(f"{operations(costs, count, each, 2000 * count) / alone:.1f}" for each in shards)]


@click.command()
@click.option("--inside", default=Costs.inside, show_default=True, help="ns of a change with the lock.")
@click.option("--transfer", default=Costs.transfer, show_default=True, help="ns of a cache line from another core.")
@click.option("--changes", default=Costs.changes, show_default=True, help="Their share of all operations.")
def main(inside: float, transfer: float, changes: float) -> None:
    """How many times what one core does, by cores and shards."""
    click.echo("cores  " + "".join(f"{each:>4} shards" for each in SHARDS))
    for count, *factors in table(Costs(inside=inside, transfer=transfer, changes=changes)):
        click.echo(f"{count:>5}  " + "".join(f"{each:>11}" for each in factors))


if __name__ == "__main__":
    main()
