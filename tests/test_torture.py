"""The short form of every part of the torture suite (tests/torture/)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.torture import campaign


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
