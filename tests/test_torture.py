"""The short form of every part of the torture suite (tests/torture/), and what its figures are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from shmcache import Cache
from tests.torture import campaign, report
from tests.torture.interrupts import struck_within


@pytest.mark.parametrize("name", campaign.NAMES)
def test_short(name: str, show: Callable[[str], None]) -> None:
    """With another seed each time, which the log gives; SHMCACHE_SEED makes the choices of an earlier run again."""
    seed = int(os.environ.get("SHMCACHE_SEED") or int.from_bytes(os.urandom(4), "big"))
    result = campaign.run(name, seed, rounds=campaign.load(name).short)
    if result.skipped:
        pytest.skip(result.skipped)
    done = ", ".join(f"{number:,} {what}" for what, number in result.counts.items())
    show(f"seed {seed}, {result.seconds:.1f} s: {done}")
    assert result.failures == [], f"SHMCACHE_SEED={seed}\n{result.failures[0]}"
    assert result.rounds > 0


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    samples = [float(number) for number in range(1, 101)]
    assert [campaign.percentile(samples, share) for share in (0.001, 0.5, 0.99, 1)] == [1, 50, 99, 100]
    assert [campaign.percentile([3.0, 1.0, 2.0], share) for share in (0.33, 0.34, 0.5, 0.99)] == [1, 2, 2, 3]
    assert campaign.figures([each / 1e3 for each in samples]) == ("50.00", "99.00", "100.00")
    assert campaign.figures([0.001, 0.002, 0.003]) == ("2.00", "–", "3.00"), "a p99 of three is none"  # noqa: RUF001


def test_an_interrupt_counts_only_where_it_struck_the_package(make_cache: Callable[..., Cache]) -> None:
    """Compiled or not."""
    cache = make_cache(max_bytes="1MB")
    with pytest.raises(KeyError) as within:
        cache["missing"]
    assert struck_within(within.value)
    with pytest.raises(KeyError) as engine:
        cache.incr("missing")
    assert struck_within(engine.value)
    with pytest.raises(ZeroDivisionError) as elsewhere:
        cache.set("key", 1 / 0)
    assert not struck_within(elsewhere.value)


def test_runs_of_a_part_add_up_on_the_page() -> None:
    def run(commit: str, kills: int, recovery: float, failures: list[str]) -> dict[str, Any]:
        part = {
            "name": "kills",
            "rounds": kills,
            "seconds": 60.0,
            "counts": {"kills": kills},
            "failures": failures,
            "samples": {"recovery, a": [recovery]},
            "skipped": None,
            "complete": False,
        }
        about = {
            "command": f"python run {kills}",
            "commit": commit,
            "mode": "compiled",
            "python": "3",
            "machine": "one",
        }
        return {**about, "parts": [part]}

    runs = [run("first", 1000, 0.002, []), run("second", 234, 0.5, ["a worker hangs"])]
    both = report.merged(runs)
    [part] = both["parts"]
    assert (part["rounds"], part["seconds"], part["counts"]) == (1234, 120.0, {"kills": 1234})
    assert "| 1,234 kills, in 120 s | 1 |" in report.table(both, {"kills": "nothing is lost"})
    assert "Failures: 1." in report.headlines(both)
    assert "| recovery, a | 1 | 2.00 | – | 2.00 |" in report.durations(both)  # noqa: RUF001
    assert "`python run 1000` at commit `first`" in report.how(runs)
    assert "one: 2 minutes" in report.how(runs)
