"""Deaths within the recovery from a death, and within the recovery from that: what is left is found in order.

On the sources, as in `faults.py`: a child dies before a store of an operation, the next one before a store of its
recovery or of a repair, perhaps a third and a fourth; then this process picks it up.
"""

from __future__ import annotations

from collections.abc import Iterator

from shmcache import Cache
from shmcache.engine import lock
from tests.conftest import Clock
from tests.processes import no_gc
from tests.torture.campaign import Part, Trial
from tests.torture.faults import dies
from tests.torture.situations import CASES, Case, Image, contents, mend, small_cache

STORES = 130  # about as many as the longest operations have, and
RECOVERY_STORES = 60  # as most recoveries have: a later one is no death
MOST_DEATHS = 4
TRIES = 50  # of each cache


def rounds(trial: Trial) -> Iterator[None]:
    """A round is an operation with at least two deaths."""
    lock.PROBE_NS = 0  # ask the kernel about a silent owner at once
    names = list(CASES)
    with no_gc():
        while True:
            clock = Clock()
            name = trial.rng.choice(names)
            with small_cache(trial, clock) as cache:
                case = CASES[name](cache, clock)
                before = Image(cache)
                for _ in range(TRIES):
                    before.restore()
                    deaths = die_again_and_again(trial, cache, case)
                    mend(cache, case)
                    assert cache.check() == [], f"{name}, {deaths} deaths"
                    found = sorted(contents(cache))
                    assert found in [sorted(entries) for entries in case.allowed], f"{name}, {deaths} deaths: {found}"
                    if deaths > 1:
                        trial.count("double deaths")
                        if deaths > 2:
                            trial.count(f"of them {deaths} in a row")
                        yield
                before.restore()
                cache.repair()


def die_again_and_again(trial: Trial, cache: Cache, case: Case) -> int:
    """Let one process after the other die; how many did."""
    if dies(cache, case.operation, trial.rng.randint(1, STORES)) is None:
        return 0
    deaths = 1
    while deaths < MOST_DEATHS and trial.rng.random() < 0.8:
        repairs = case.mend is not None or trial.rng.random() < 0.3
        operation = (lambda cache: cache.repair()) if repairs else (lambda cache: cache.delete("no such key"))
        if dies(cache, operation, trial.rng.randint(1, RECOVERY_STORES)) is None:
            break
        deaths += 1
    return deaths


PART = Part(
    claim="a process that dies while it recovers what a dead one left leaves no more to do to the next one",
    rounds=rounds,
    short=200,
    share=2.0,
    on_sources=True,
)
