"""A death before every single store of every kind of operation: the entries are as before it, or as after it.

This is about the order of the stores, which is the same compiled and uncompiled, so it runs on the sources, where each
store can be made the last one of a process: a forked child counts its stores and kills itself before number 1, then
another child before number 2, and so on until a child survives. Whatever it left is then picked up by this process.
Each place in the engine's source that stores something has to have been such a last one: `unreached` names those that
were not.
"""

from __future__ import annotations

import ast
import itertools
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from shmcache import Cache, engine
from shmcache.engine import lock, primitives
from shmcache.semaphore import Sleeper
from tests.conftest import Clock
from tests.processes import Child, no_gc
from tests.torture.campaign import Part, Trial
from tests.torture.situations import CASES, Case, Image, Make, Operation, contents, judge, small_cache

# --- dying at a store -----------------------------------------------------------------------------------------------
STORES = {"store", "store_release", "logged_store", "compare_and_swap", "store_seq_cst", "copy_in"}
ENGINE = Path(engine.__file__).parent

# Stores outside of any critical section, or that no death can come between.
ELSEWHERE = {
    "keys.TuplePacker.add": "memory of this process alone",
    "keys.TuplePacker.pack_call": "memory of this process alone",
    "message.Message.put_body": "memory of this process alone",
    "membership.Member.count": "a statistic in this process's own line",
    "membership.Registry._finish_fold": "as _take_line, which it is a part of",
    "membership.Registry._fold": "as _take_line, which it is a part of",
    "membership.Registry._take_line": "under the setup lock: tests/test_processes.py kills a process at each of them",
    "membership.Registry.take_leave": "the last store of a process that detaches",
    "shard.Shard.format": "at creation, before anybody can attach",
}

_label = memoryview(mmap.mmap(-1, 4096))  # where the child that dies next says where
_stores = memoryview(mmap.mmap(-1, 8)).cast("Q")  # how many stores it has come to
NEVER = 1 << 62


def arm(last: int) -> None:
    """Make this process die before its store number `last`, and in the midst of copying bytes."""
    _stores[0] = 0
    # A wake-up that an earlier death left in the semaphore would give the stores other numbers.
    setattr(Sleeper, "sleep", lambda sleeper: False)  # noqa: B010

    def step() -> None:
        _stores[0] += 1
        if _stores[0] == last:
            name = place().encode()
            _label[: len(name) + 1] = name + b"\0"
            os.kill(os.getpid(), signal.SIGKILL)

    real_store, real_copy_in = primitives.store, primitives.copy_in

    def store(words: memoryview, index: int, value: int) -> None:
        step()
        real_store(words, index, value)

    def copy_in(data: memoryview, at: int, source: bytes, size: int) -> bool:
        step()
        if size:
            real_copy_in(data, at, source, size // 2 + 1)
        step()
        return real_copy_in(data, at, source, size)

    # `logged_store` and `compare_and_swap` call the `store` of their module, so each of theirs counts too.
    stand_ins = {"store": store, "store_release": store, "store_seq_cst": store, "copy_in": copy_in}
    for path, module in list(sys.modules.items()):
        if path.startswith("shmcache.engine."):
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    setattr(module, name, stand_in)


def place() -> str:
    """Which store of the engine's source is being made now: `module.function:line`."""
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).parent != ENGINE or frame.f_globals["__name__"].endswith(".primitives"):
        assert frame.f_back is not None
        frame = frame.f_back
    module = frame.f_globals["__name__"].rpartition(".")[2]
    return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}"


def places() -> dict[str, range]:
    """Every place in the engine's source that stores something: its name and lines."""
    found: dict[str, range] = {}

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                walk(child, f"{owner}.{child.name}")
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in STORES:
                assert child.end_lineno is not None
                found[f"{owner}:{child.lineno}"] = range(child.lineno, child.end_lineno + 1)
            walk(child, owner)

    for path in sorted(ENGINE.glob("*.py")):
        if path.stem != "primitives":
            walk(ast.parse(path.read_text()), path.stem)
    return {name: lines for name, lines in found.items() if name.partition(":")[0] not in ELSEWHERE}


def unreached(reached: set[str]) -> list[str]:
    """The places where no process died."""
    lines: dict[str, set[int]] = {}
    for each in reached:
        owner, _, line = each.partition(":")
        lines.setdefault(owner, set()).add(int(line))
    return [name for name, span in places().items() if not lines.get(name.partition(":")[0], set()).intersection(span)]


def dies(cache: Cache, operation: Operation, last: int) -> str | None:
    """Perform an operation in a child that dies before its store number `last`; where, or None if it did not."""

    def work() -> None:
        cache._attached()  # take a place in the process table before the stores count
        arm(last)
        operation(cache)

    code = Child(work).wait()
    assert code in (0, -signal.SIGKILL), "the operation failed: see its traceback above"
    return bytes(_label).partition(b"\0")[0].decode() if code else None


def crash(cache: Cache, case: Case, last: int, before: Image) -> str | None:
    """Let the operation die before its store number `last`, and judge what it left; where it died, None if it did not.

    Without a death the contents must be the last of those allowed, which is what the whole operation comes to.
    """
    before.restore()
    died = dies(cache, case.operation, last)
    after = judge(cache, case, by_looking=died is not None and last % 2 == 0, where=f"dead before store {last}, {died}")
    if died is None:
        assert after == case.allowed[-1]
    return died


# --- the part -------------------------------------------------------------------------------------------------------
def recovery(of: str, share: float) -> Make:
    """The recovery from a death within another case, about `share` of its way through."""

    def make(cache: Cache, clock: Clock) -> Case:
        dead = CASES[of](cache, clock)
        before = Image(cache)
        assert dies(cache, dead.operation, NEVER) is None
        last = 1 + round(share * (_stores[0] - 1))
        before.restore()
        assert dies(cache, dead.operation, last) is not None
        left = Image(cache)
        cache.delete("no such key")
        comes_to = contents(cache)
        assert comes_to in dead.allowed
        left.restore()
        return Case(lambda cache: cache.delete("no such key"), [comes_to])

    return make


RECOVERIES = {
    f"recovery from death in: {name} ({fifth}/5)": recovery(name, fifth / 5)
    for name in (
        "insert into several runs",
        "overwrite b with 2 blocks, ttl 5.0",
        "insert where all slots are in use",
        "delete d of 8",
        "clear",
        "repair of a sound shard",
    )
    for fifth in range(6)
}


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one death. When not all of them can be had, every n-th store, beginning anywhere."""
    lock.PROBE_NS = 0  # ask the kernel about a silent owner at once: there are thousands of them
    # An odd number, so that both ways of looking at what a death left are taken.
    stride = 1 if trial.goal is None else DEATHS // trial.goal | 1
    reached: set[str] = set()
    cases = CASES | RECOVERIES
    names = list(cases)
    trial.rng.shuffle(names)
    with no_gc():
        for name in names:
            clock = Clock()
            with small_cache(trial, clock) as cache:
                case = cases[name](cache, clock)
                before = Image(cache)
                for last in itertools.count(trial.rng.randint(1, stride), stride):
                    died = crash(cache, case, last, before)
                    if died is None:
                        break
                    reached.add(died)
                    trial.count("deaths")
                    yield
                before.restore()
                cache.repair()
            trial.count("operations")
            missed = unreached(reached)
            trial.counts["places in the source"] = len(places())
            trial.counts["places reached"] = len(places()) - len(missed)
    assert stride > 1 or not missed, f"no process died at {missed}"


DEATHS = 11_000  # about as many as there are

PART = Part(
    claim="a process that dies before any store of any operation leaves the entries as before it or as after it",
    rounds=rounds,
    short=1_300,  # nox -s torture tries all of them
    on_sources=True,
    sweep=True,
)
