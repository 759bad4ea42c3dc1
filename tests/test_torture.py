"""The short form of every part of the torture suite (tests/torture/), and what its figures are."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shmcache import Cache
from tests.torture import campaign
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
