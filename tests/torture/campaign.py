"""What the parts of the torture suite have in common: what a part is, and what a run of one has to say.

A part runs in an interpreter of its own (`python -m tests.torture.campaign NAME ...`), so that nothing it does to its
process can hurt another part, and so that a hang of it is seen from outside. It tells what it did in lines of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmcache import Cache, segment
from tests.processes import environment

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "faults",
    "instructions",
    "double_deaths",
    "kills",
    "interrupts",
    "torn_reads",
    "linearizability",
    "churn",
    "lock_model",
    "unlinked",
    "hostile",
)
SILENCE = 120.0  # seconds without a word after which a part is taken to hang
REPORT = 0.25  # seconds between two words


@dataclass(frozen=True)
class Part:
    """One part of the suite: a claim about the cache, and rounds that try to refute it.

    `rounds` takes a `Trial` and yields after each round, for ever or until there is nothing more to try. It raises
    AssertionError when the claim is wrong. Everything it chooses, it chooses by `trial.rng`.
    """

    claim: str
    rounds: Callable[[Trial], Iterator[None]]
    short: int  # rounds in the normal test run
    share: float = 1.0  # of the time of a whole run, relative to the other parts
    on_sources: bool = False  # runs on the uncompiled sources, whatever is installed
    sweep: bool = False  # its rounds come to an end, and only then has it shown all of its claim
    missing: Callable[[], str | None] = lambda: None  # what this machine lacks for it, in words


class Trial:
    """One run of a part: its random choices, its caches, and what it has done."""

    def __init__(self, seed: int, rounds: int | None = None) -> None:
        self.seed = seed
        self.goal = rounds
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.samples: dict[str, list[float]] = {}
        self._names = (f"{prefix(os.getpid())}{number}" for number in itertools.count())

    def count(self, what: str, number: int = 1) -> None:
        """Add to the number of things done, such as "kills"."""
        self.counts[what] += number

    def measure(self, what: str, seconds: float) -> None:
        """Note how long something took."""
        self.samples.setdefault(what, []).append(seconds)

    @contextlib.contextmanager
    def cache(self, **options: Any) -> Iterator[Cache]:
        """A new cache, which is in order at the end of the block and then removed."""
        name = next(self._names)
        try:
            with Cache(name, **options) as cache:
                yield cache
                assert cache.check() == []
        finally:
            segment.unlink(name)


@dataclass
class Result:
    """What a run of a part came to. `samples` are seconds."""

    name: str
    rounds: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: str | None = None
    complete: bool = False  # there was nothing more to try


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that this share of them (above 0, to 1) does not exceed."""
    return sorted(samples)[math.ceil(len(samples) * share) - 1]


def figures(samples: list[float]) -> tuple[str, str, str]:
    """p50, p99 and the longest in ms, as they are shown; of fewer than 100 the p99 would be the longest: none."""
    p50, p99, longest = (f"{1e3 * percentile(samples, share):.2f}" for share in (0.5, 0.99, 1))
    return p50, p99 if len(samples) >= 100 else "–", longest  # noqa: RUF001


def load(name: str) -> Part:
    part: Part = importlib.import_module(f"tests.torture.{name}").PART
    return part


def run(
    name: str,
    seed: int,
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run a part in an interpreter of its own until its rounds or seconds are over, or it fails."""
    part = load(name)
    result = Result(name)
    if (lack := part.missing()) is not None:
        result.skipped = lack
        return result
    command = [sys.executable, "-m", "tests.torture.campaign", name, "--seed", str(seed)]
    if rounds is not None:
        command += ["--rounds", str(rounds)]
    if seconds is not None:
        command += ["--seconds", str(seconds)]
    env = environment(SHMCACHE_PURE="1") if part.on_sources else environment()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        ended = False
        try:
            for line in _lines(process):
                if line is None:
                    result.failures.append(f"no word for {SILENCE:.0f} s: it hangs")
                    break
                said = json.loads(line)
                for key, value in said.items():
                    setattr(result, key, value)
                progress(result)
                if "failures" in said:  # the last word
                    ended = True
                    process.wait(SILENCE)
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever of it is left
            process.wait()
            for left in segment.names():
                if left.startswith(prefix(process.pid)):
                    segment.unlink(left)
    if not ended and not result.failures:
        result.failures.append(f"it ended without its last word: exit status {process.returncode}")
    if ended and not result.rounds and not result.failures:
        result.failures.append("it did nothing")
    return result


def prefix(pid: int) -> str:
    """How the names begin of the caches of a part that runs in this process."""
    return f"torture-{pid}-"


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """What a process writes, until its end, line by line; None when nothing comes for too long."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    unread = b""
    heard = time.monotonic()
    while True:
        ready, _, _ = select.select([pipe], [], [], 1.0)
        if not ready:
            if process.poll() is not None:
                return  # though a child of it may hold the pipe open
            if time.monotonic() - heard > SILENCE:
                yield None
                return
            continue
        heard = time.monotonic()
        more = os.read(pipe, 1 << 16)
        if not more:
            return
        *lines, unread = (unread + more).split(b"\n")
        yield from (line.decode() for line in lines)


def main() -> None:
    """Run one part in this process, telling in lines of JSON how it goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    trial = Trial(options.seed, options.rounds)
    began = told = time.monotonic()
    rounds = 0
    complete = False
    failures: list[str] = []

    def tell(**more: Any) -> None:
        state = {"rounds": rounds, "seconds": time.monotonic() - began, "counts": trial.counts, **more}
        sys.stdout.write(json.dumps(state) + "\n")
        sys.stdout.flush()

    work = load(options.name).rounds(trial)
    try:
        for _ in work:
            rounds += 1
            now = time.monotonic()
            if options.rounds is not None and rounds >= options.rounds:
                break
            if options.seconds is not None and now - began > options.seconds:
                break
            if now - told > REPORT:
                told = now
                tell()
        else:
            complete = True
        work.close()  # type: ignore[attr-defined]  # a generator, whose `with` blocks end here
    except Exception:
        failures.append(traceback.format_exc())
    tell(samples=trial.samples, failures=failures, complete=complete)


if __name__ == "__main__":
    main()
