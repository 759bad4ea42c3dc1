"""Runs workloads: starts a process for each peer, has them measure in turns, and keeps every figure of every round.

Rounds go A B C, A B C, so that what drifts (the clock of the processor, a neighbour) meets all alike. A ratio of two
peers is taken within each round, and its median over the rounds is what counts.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import PEERS, ROOT, Peer, Store, clean_up
from benchmarks.runner import Job
from benchmarks.servers import die_with_parent
from benchmarks.workloads import WORKLOADS, Room, Scale

PREFIX = "shmbench"  # of everything in /dev/shm; the pid follows
START = 60.0  # seconds for a process to be there
PATIENCE = 900.0  # seconds for an answer


@dataclass
class Results:
    """Figures by metric and peer, one for each round, and what could not be measured."""

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    workloads: dict[str, str] = field(default_factory=dict)  # of each metric
    missing: dict[str, str] = field(default_factory=dict)  # why, by peer
    failed: list[tuple[str, str, str]] = field(default_factory=list)  # peer, workload, why

    def note(self, workload: str, peer: str, metric: str, unit: str, value: float) -> None:
        self.figures.setdefault(metric, {}).setdefault(peer, []).append(value)
        self.units[metric] = unit
        self.workloads[metric] = workload

    def rounds(self, metric: str, peer: str) -> list[float] | None:
        return self.figures.get(metric, {}).get(peer)

    def median(self, metric: str, peer: str) -> float | None:
        rounds = self.rounds(metric, peer)
        return statistics.median(rounds) if rounds else None

    def ratio(self, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        """The median of the ratios of each round, of (metric, peer) to (metric, peer)."""
        above, below = self.rounds(*one), self.rounds(*other)
        if not above or not below:
            return None
        if len(above) != len(below):  # of workloads with different numbers of rounds
            return statistics.median(above) / statistics.median(below)
        return statistics.median(a / b for a, b in zip(above, below, strict=True))


class PeerFailed(Exception):
    """A peer's process did not do what it was asked."""


class Process:
    """A peer's process."""

    def __init__(self, peer: type[Peer], job: Job) -> None:
        self.peer = peer
        self.job = job
        address = str(job.store.place / "runner.sock")
        self.log = job.store.place / "runner.log"
        self.listener = Listener(address, family="AF_UNIX")
        self.listener._listener._socket.settimeout(START)  # type: ignore[attr-defined]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                peer.command(job.store, address),
                env={**os.environ, **peer.environment(), "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def begin(self) -> None:
        """Tell it what to do; it makes itself ready, and answers."""
        try:
            self.connection = self.listener.accept()
        except OSError:
            raise PeerFailed(f"its process did not start: {self.last_words()}") from None
        finally:
            self.listener.close()
        self.connection.send(self.job)

    def last_words(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())[-300:]

    def answer(self) -> list[Any]:
        try:
            if not self.connection.poll(PATIENCE):
                raise PeerFailed(f"no answer within {PATIENCE:.0f} s")
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise PeerFailed(f"its process ended: {self.last_words()}") from None
        if isinstance(answer, str):
            raise PeerFailed(answer)
        figures: list[Any] = answer
        return figures

    def ask(self, what: int | None) -> list[Any]:
        try:
            self.connection.send(what)
        except OSError:
            raise PeerFailed(f"its process ended: {self.last_words()}") from None
        return self.answer()

    def end(self) -> None:
        """Let it end by itself; by its pid if it does not."""
        if hasattr(self, "connection"):
            self.connection.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Step:
    """One store of one workload: these peers measure together."""

    workload: str
    room: Room
    peers: tuple[str, ...]
    rounds: int


def plan(scale: Scale, workloads: Iterable[str], peers: Iterable[str]) -> list[Step]:
    """What is to be done, in order."""
    steps = []
    for name in workloads:
        workload = WORKLOADS[name](scale)
        for room in workload.rooms():
            taking = tuple(peer for peer in peers if workload.takes(PEERS[peer], room))
            rounds = room.rounds or scale.rounds
            groups = [taking] if room.together else [(peer,) for peer in taking]
            steps += [Step(name, room, group, rounds) for group in groups if group]
    return steps


def run(steps: list[Step], scale: Scale, results: Results, done: Callable[[Step], None]) -> None:
    """Perform the steps; `done(step)` is called after each round."""
    clean_up_after_the_dead()
    for number, step in enumerate(steps):
        with processes(step, scale, number, results) as running:
            for turn in range(step.rounds):
                for process in list(running):
                    with noting(results, step, process, running):
                        for figure in process.ask(turn):
                            results.note(step.workload, process.job.peer, *figure)
                done(step)
            for process in list(running):
                with noting(results, step, process, running):
                    process.ask(None)
    for name in dict.fromkeys(step.workload for step in steps):
        for peer, figures in WORKLOADS[name](scale).conclude(results.figures).items():
            for figure in figures:
                results.note(name, peer, *figure)


def clean_up_after_the_dead() -> None:
    """Remove what runs left that were killed."""
    for file in Path("/dev/shm").glob(f"*{PREFIX}-*"):
        owner = file.name.partition(f"{PREFIX}-")[2].partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            clean_up(f"{PREFIX}-{owner}-")


@contextmanager
def processes(step: Step, scale: Scale, number: int, results: Results) -> Iterator[list[Process]]:
    """The peers' processes, ready; nothing is left of them."""
    base = f"{PREFIX}-{os.getpid()}-{number}"
    place = Path(tempfile.mkdtemp(prefix=f"{base}-", dir="/dev/shm"))
    running: list[Process] = []
    try:
        for index, name in enumerate(step.peers):
            room, own = step.room, place / str(index)
            own.mkdir()
            store = Store(f"{base}-{index}", own, room.kind, room.entries, room.max_bytes, room.about, room.ttl)
            running.append(Process(PEERS[name], Job(name, step.workload, store, scale)))
        for process in list(running):
            with noting(results, step, process, running):
                process.begin()
        for process in list(running):
            with noting(results, step, process, running):
                process.answer()
        yield running
    finally:
        for process in running:
            process.end()
        clean_up(base)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def noting(results: Results, step: Step, process: Process, running: list[Process]) -> Iterator[None]:
    """A peer that fails is noted, and takes no further part in this step."""
    try:
        yield
    except PeerFailed as error:
        results.failed.append((process.job.peer, step.workload, str(error)))
        running.remove(process)
        process.end()
