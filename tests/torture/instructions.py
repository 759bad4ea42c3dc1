"""A death after every single machine instruction of every kind of operation, in the engine as it is compiled.

The kernel lets a forked child run one instruction at a time (ptrace). Killed there, it would leave the memory as these
instructions left it; so the contents that the shard had one after the other in the course of an operation are all that
a death in it can leave. Each of them is put back once the child is dead, which is then a dead owner of the lock, and
picked up by this process. Of some, another child's recovery is taken apart in the same way. Nothing is added to the
code for this, not even between two stores: what the compiler made of them is what is tried.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Generator, Iterator

from shmcache import Cache, is_compiled
from tests.conftest import Clock
from tests.processes import Child, no_gc
from tests.torture.campaign import Part, Trial
from tests.torture.situations import CASES, Case, Image, Operation, contents, judge, mend, small_cache

TRACEME, SINGLESTEP = 0, 9  # <sys/ptrace.h>
RECOVERIES = 2  # of each operation, taken apart themselves
STRIDE = 15  # of the states of an operation, a short run judges every n-th: an odd number, see `judge_each`

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int = 0) -> None:
    if _ptrace(request, pid, None, None) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")


def step_by_step(cache: Cache, operation: Operation) -> tuple[list[Image], int]:
    """Perform an operation in a child: the contents the shard has in its course, and the number of instructions."""

    def work() -> None:
        cache._attached()  # take a place in the process table before
        ptrace(TRACEME)
        os.kill(os.getpid(), signal.SIGSTOP)
        operation(cache)

    child = Child(work)
    child.wait_until_stopped()
    states = [Image(cache)]
    instructions = 0
    while True:
        ptrace(SINGLESTEP, child.pid)
        if not child.has_stopped():
            break
        instructions += 1
        if not states[-1].is_now():
            states.append(Image(cache))
    assert child.status == 0, "the operation failed: see its traceback above"
    return states, instructions


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one state that a death can leave."""
    stride = 1 if trial.goal is None else STRIDE
    names = list(CASES)
    with no_gc():
        while True:
            trial.rng.shuffle(names)
            for name in names:
                clock = Clock()
                with small_cache(trial, clock) as cache:
                    case = CASES[name](cache, clock)
                    states = yield from judge_each(trial, cache, case, stride, name)
                    for state in trial.rng.choices(states, k=RECOVERIES):
                        again = recovery(cache, case, state)
                        yield from judge_each(trial, cache, again, stride, f"recovery from a death in {name}")
                    cache.repair()


def recovery(cache: Cache, case: Case, state: Image) -> Case:
    """What the next owner of the lock does about a death that left this state; the cache is in it."""
    state.restore()
    mend(cache, case)
    comes_to = contents(cache)
    state.restore()
    return Case(lambda cache: mend(cache, case), [comes_to], case.mend)


def judge_each(trial: Trial, cache: Cache, case: Case, stride: int, name: str) -> Generator[None, None, list[Image]]:
    """Take an operation apart, and judge what deaths in it leave."""
    states, instructions = step_by_step(cache, case.operation)
    trial.count("operations taken apart")
    trial.count("instructions", instructions)
    for number in range(trial.rng.randrange(stride), len(states), stride):
        states[number].restore()
        judge(cache, case, by_looking=number % 2 == 0, where=f"{name}: dead in state {number} of {len(states)}")
        trial.count("states left by a death")
        yield
    states[-1].restore()
    assert judge(cache, case, by_looking=False, where=f"{name}: after all") == case.allowed[-1]
    return states


def missing() -> str | None:
    if not is_compiled():
        return "it is for the compiled engine"
    if platform.system() != "Linux":
        return "it needs ptrace as Linux has it"
    if Child(ptrace, TRACEME).wait():
        return "ptrace is not allowed here"
    return None


PART = Part(
    claim="a process that dies after any machine instruction leaves the entries as before its operation or as after it",
    rounds=rounds,
    short=100,
    share=2.0,
    missing=missing,
)
