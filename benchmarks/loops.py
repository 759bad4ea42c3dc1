"""The loops that are timed, in the process of the peer: one shape for all, with the peer's statement written in.

Names that a statement uses are locals. What the loop itself takes is measured by an empty one, and not subtracted; what
the clock takes is, from the times of single operations.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from benchmarks.peers import Peer, Store

TIGHT = """
def loop(keys, value, {names}):
    start = now()
    for key in keys:
{operation}
    return now() - start
"""

CLOCKED = """
def loop(keys, value, note, {names}):
    for key in keys:
        before = now()
{operation}
        note(now() - before)
"""

MIXED = """
def loop(plan, value, seconds, {names}):
    done = 0
    start = now()
    end = start + int(seconds * 1e9)
    while True:
        for chunk in plan:
            for operation, key in chunk:
                if operation == 0:
{get}
                elif operation == 1:
{set}
                else:
{delete}
            done += len(chunk)
            if now() >= end:
                return done * 1e9 / (now() - start)
"""

ASIDE = """
def loop(keys, value, seconds, {names}):
    done = hits = 0
    start = now()
    end = start + int(seconds * 1e9)
    while True:
        for chunk in keys:
            for key in chunk:
{get}
                if result is None:
{set}
                else:
                    hits += 1
            done += len(chunk)
            if now() >= end:
                return done * 1e9 / (now() - start), hits / done, done
"""

PACED = """
def loop(plan, value, interval, note, {names}):
    due = now()
    for operation, key in plan:
        due += interval
        while now() < due:
            pass
        if operation == 0:
{get}
        elif operation == 1:
{set}
        else:
{delete}
        note(now() - due)
"""

ONCE = """
def loop(key, value, {names}):
{operation}
    return result
"""


FEWEST = 20  # operations that a figure is the mean of


def chunked(items: Sequence[Any], size: int = 100) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest that at least this share does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Bench:
    """An open peer, in this process, with what can be measured of it."""

    def __init__(self, kind: type[Peer], store: Store) -> None:
        self.store = store
        self.value = store.value
        self.peer = kind(store)
        self.names = self.peer.open()
        self._loops: dict[tuple[str, ...], Callable[..., Any]] = {}

    def can(self, *operations: str) -> bool:
        return all(operation in self.peer.operations for operation in operations)

    def to_keys(self, keys: Iterable[str]) -> list[Any]:
        """These as the peer takes them."""
        return [key.encode() for key in keys] if self.peer.bytes_keys else list(keys)

    def loop(self, template: str, **operations: str) -> Callable[..., Any]:
        """A template with the peer's statements for these operations."""
        asked = (template, *operations.values())
        if asked not in self._loops:
            statements = {}
            for line in template.splitlines():
                place = line.strip("{}")
                if place in operations:
                    statement = self.peer.statement(operations[place], self.store.kind)
                    statements[place] = textwrap.indent(statement, " " * INDENTS[template, place])
            space = {**self.names, "now": time.perf_counter_ns}
            if self.peer.packs:
                import msgpack  # type: ignore[import-untyped, unused-ignore]

                space |= {"packb": msgpack.packb, "unpackb": msgpack.unpackb}
            names = ", ".join(f"{name}={name}" for name in space)
            exec(template.format(names=names, **statements), space)
            self._loops[asked] = space["loop"]
        return self._loops[asked]

    def forget_loops(self) -> None:
        self._loops.clear()

    # --- one process ------------------------------------------------------------------------------------------------
    def tight(self, operation: str, keys: Sequence[Any], slices: int = 1) -> float:
        """ns per operation: the mean; of several slices the median, so that a moment when others ran does no harm."""
        loop = self.loop(TIGHT, operation=operation)
        parts = chunked(keys, -(-len(keys) // slices))
        with collector_off():
            means: list[float] = [loop(part, self.value) / len(part) for part in parts]
        return statistics.median(means)

    def clocked(self, operation: str, keys: Sequence[Any]) -> list[float]:
        """ns of each operation, in order of size."""
        times: list[int] = []
        with collector_off():
            self.loop(CLOCKED, operation=operation)(keys, self.value, times.append)
        cost = clock_cost()
        return sorted(max(0.0, each - cost) for each in times)

    def fill(self, keys: Sequence[Any]) -> None:
        self.loop(TIGHT, operation="set" if self.can("set") else "insert" if self.can("insert") else "get")(
            keys, self.value
        )

    def setter(self) -> Callable[[Sequence[Any], Any], Any]:
        """Stores one value under some keys."""
        return self.loop(TIGHT, operation="set")

    def idle(self, keys: Sequence[Any]) -> list[float]:
        """ns of nothing, as often as there are keys, measured as `clocked` does."""
        cost, now = clock_cost(), time.perf_counter_ns
        times: list[int] = []
        note = times.append
        with collector_off():
            for _ in keys:
                before = now()
                note(now() - before)
        return [max(0.0, each - cost) for each in times]

    def fits(self, operation: str, keys: Sequence[Any], seconds: float) -> int:
        """How many of these operations take about that long; at most as many as there are keys."""
        number, taken = 1, 0.0
        while True:
            # The shorter of two, so that a moment when others ran does not leave twenty operations for a figure.
            taken = min(self.tight(operation, keys[:number]) for _ in range(2)) * number / 1e9
            if taken > seconds / 20 or number >= len(keys):
                return min(len(keys), max(FEWEST, int(number * seconds / max(taken, 1e-9))))
            number = min(len(keys), number * 4)

    def once(self, operation: str, key: Any) -> Any:
        """What one get finds, of a key that may also be several."""
        return self.loop(ONCE, operation=operation)(key, self.value)

    # --- several ----------------------------------------------------------------------------------------------------
    def together(self, count: int, work: Callable[[Bench, int], Any]) -> list[Any]:
        """What `work` returns in `count` forked processes that start it at the same moment."""
        if not self.peer.survives_fork:
            self.close()
        try:
            return self._together(count, work)
        finally:
            if not self.peer.survives_fork:
                self.names = self.peer.open()

    def _together(self, count: int, work: Callable[[Bench, int], Any]) -> list[Any]:
        context = get_context("fork")
        ready, go = context.Semaphore(0), context.Event()
        pipes = [context.Pipe(duplex=False) for _ in range(count)]

        def child(number: int) -> None:
            self.names = self.peer.reopen()
            self.forget_loops()
            ready.release()
            go.wait()
            pipes[number][1].send_bytes(pickle.dumps(work(self, number)))
            pipes[number][1].close()
            os._exit(0)  # whatever the parent would do at its end is the parent's

        processes = [context.Process(target=child, args=(number,)) for number in range(count)]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        for process in processes:
            while not ready.acquire(timeout=1):
                if not process.is_alive():
                    raise RuntimeError("a process ended before it began")
        go.set()
        try:
            return [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
        except EOFError:
            raise RuntimeError("a process ended before it was done") from None
        finally:
            for process in processes:
                process.join()

    def close(self) -> None:
        self.forget_loops()
        self.names = {}
        self.peer.close()


def _indents(template: str) -> dict[str, int]:
    """How far in each place of a template is: one step more than the line before, which is its block's head."""
    found, lines = {}, template.splitlines()
    for line, place in itertools.pairwise(lines):
        if place.startswith("{"):
            depth = len(line) - len(line.lstrip())
            found[place.strip("{}")] = depth + 4 * line.rstrip().endswith(":")
    return found


INDENTS = {
    (template, place): depth
    for template in (TIGHT, CLOCKED, MIXED, ASIDE, PACED, ONCE)
    for place, depth in _indents(template).items()
}


@contextmanager
def collector_off() -> Iterator[None]:
    """No collection of garbage within the block, which would be one peer's bad luck."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def clock_cost() -> float:
    """ns between two readings of the clock with nothing between them: the median."""
    now = time.perf_counter_ns
    times = []
    for _ in range(1001):
        before = now()
        times.append(now() - before)
    return float(sorted(times)[500])
