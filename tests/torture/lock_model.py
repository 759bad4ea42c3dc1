"""The lock and recovery as a model, `shmcache/engine/lock.pml`, of which `spin` tries the steps in every order.

Nothing of the cache itself runs here. Variants with a mistake show that the claims would notice one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.torture.campaign import ROOT, Part, Trial

MODEL = ROOT / "shmcache" / "engine" / "lock.pml"
DEPTH = 2_000_000  # steps of one run of the model; more would be an error of the search
PATIENCE = 100.0  # seconds for one command


@dataclass(frozen=True)
class Variant:
    """One verification: what is defined for the model, and what the verifier has to say of it."""

    name: str
    defines: tuple[str, ...]
    refuted: str | None = None  # the claim that has to fail
    endless: bool = False  # look for runs without end in which no process is kept from going on


SHORT = (
    Variant("wake-ups", ("NO_TIMEOUT", "NO_CRASH", "ROUNDS=2")),
    Variant("a death and a successor", ("ROUNDS=1", "DEATHS=1")),
    Variant("a death in recovery", ("ROUNDS=1", "DEATHS=2", "NO_SUCCESSOR")),
    Variant("an end", ("ROUNDS=1", "DEATHS=1", "NO_SUCCESSOR", "ALWAYS_PROBE"), endless=True),
    Variant("post before decrement", ("NO_TIMEOUT", "NO_CRASH", "BUG_POST_BEFORE_DECREMENT"), r"\(unposted>0\)"),
    Variant("store before log entry", ("ROUNDS=1", "DEATHS=1", "BUG_STORE_BEFORE_LOG"), r"word\[0\]==word\[1\]"),
    Variant("steal on time-out", ("NO_CRASH", "BUG_STEAL_ON_TIMEOUT"), r"running\[.*!=holder"),
    # What the millisecond is for: if sleeps had no end, those who wait for a dead owner would never look again.
    Variant("sleep without end", ("NO_TIMEOUT", "ROUNDS=1", "DEATHS=1", "NO_SUCCESSOR"), "invalid end state"),
)
LONG = (
    Variant("time-outs", ("NO_CRASH", "ROUNDS=2")),
    Variant("an end, with a successor", ("ROUNDS=1", "DEATHS=1", "ALWAYS_PROBE"), endless=True),
    Variant("two deaths and successors", ("ROUNDS=1", "DEATHS=2")),  # takes a gigabyte
)


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def missing() -> str | None:
    """What this machine lacks for it."""
    if not shutil.which("spin"):
        return "spin (Debian: apt-get install spin)"
    if not compiler():
        return "a C compiler (Debian: apt-get install gcc)"
    return None


def verify(variant: Variant) -> tuple[int, int, str]:
    """How many claims failed and how many states there are, with all that the verifier said."""
    # NOREDUCE: a partial order reduction need not be trusted. NP: cycles without progress. NFAIR: for `-f`, fairness.
    search = ["-DNP", "-DNFAIR=3"] if variant.endless else ["-DSAFETY"]
    with tempfile.TemporaryDirectory() as directory:

        def call(*command: str) -> str:
            done = subprocess.run(
                command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
            )
            assert done.returncode == 0 or command[0] == "./pan", done.stdout
            return done.stdout

        call("spin", *(f"-D{name}" for name in variant.defines), "-a", str(MODEL))
        call(str(compiler()), "-O2", "-w", "-DNOREDUCE", *search, "-o", "pan", "pan.c")
        said = call("./pan", "-b", "-n", f"-m{DEPTH}", *(["-l", "-f"] if variant.endless else []))
    figures = re.search(r"errors: (\d+)\n +(\d+) states, stored", said)
    assert figures, said
    return int(figures[1]), int(figures[2]), said


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one variant; after the last there is nothing more to try."""
    for variant in SHORT + LONG:
        began = time.monotonic()
        errors, states, said = verify(variant)
        trial.measure("verification", time.monotonic() - began)
        if variant.refuted is None:
            assert errors == 0, f"{variant.name}: {said}"
            assert "not completed" not in said, f"{variant.name}: {said}"
            trial.count("states", states)
        else:
            assert errors > 0, f"{variant.name} went unnoticed: {said}"
            assert re.search(variant.refuted, said), f"{variant.name} was refuted by another claim: {said}"
            trial.count("mistakes found")
        trial.count("variants")
        yield


PART = Part(
    claim="in no order of their steps do live processes share a lock, rob each other, or sleep beside a free lock",
    rounds=rounds,
    short=len(SHORT),
    share=0.2,
    sweep=True,
    missing=missing,
)
