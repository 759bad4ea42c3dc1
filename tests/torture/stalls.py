"""How long single operations take while others die: the longest of each worker, and the part of it that is the cache's.

With more workers than cores an operation may take long for want of a core alone. The kernel counts how long a process
was ready to run and did not (/proc/self/schedstat); without that, what is left is what the cache made it wait for.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Longest:
    """Of all operations since the last look, in seconds."""

    operation: float
    but_for_cores: float | None  # less what it waited for a core; None where the kernel does not tell


class Stalls:
    """Three words for each worker, in memory that outlives it.

    Its longest operation, the longest but for cores, and when the one that is under way began (0: none is).
    """

    def __init__(self, workers: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, 3 * workers * 8)).cast("Q")
        self.of = [self.memory[3 * worker : 3 * worker + 3] for worker in range(workers)]

    def timed(self, worker: int, operation: Callable[[], object]) -> object:
        """Do it, and keep how long it took if no other took longer."""
        words = self.of[worker]
        waited = ns_without_a_core()
        words[2] = began = time.perf_counter_ns()
        answer = operation()
        took = time.perf_counter_ns() - began
        words[2] = 0
        words[0] = max(took, words[0])
        if took > words[1]:  # asking costs more than most operations
            own = max(0, took - (ns_without_a_core() - waited))
            words[1] = max(own, words[1])
        return answer

    def so_far(self, worker: int) -> int:
        """How long its operation that is under way has taken, ns; 0 if there is none."""
        began = self.of[worker][2]
        return time.perf_counter_ns() - began if began else 0

    def forget(self, worker: int) -> None:
        """It is dead, and what it was doing is not its successor's."""
        self.of[worker][:] = memoryview(bytes(24)).cast("Q")

    def take(self, victim: int | None = None) -> Longest:
        """The longest of all workers but the victim, as far as it has come; the next look begins anew."""
        others = [worker for worker in range(len(self.of)) if worker != victim]
        operation = max(max(self.of[worker][0], self.so_far(worker)) for worker in others)
        own = max(self.of[worker][1] for worker in others)
        for words in self.of:
            words[0] = words[1] = 0
        return Longest(operation / 1e9, own / 1e9 if _schedstat(os.getpid()) is not None else None)


def ns_without_a_core() -> int:
    """How long this process has been ready to run and did not, ns since its start; 0 where the kernel does not tell."""
    fd = _schedstat(os.getpid())
    return 0 if fd is None else int(os.pread(fd, 64, 0).split()[1])


@functools.lru_cache(1)
def _schedstat(pid: int) -> int | None:
    """An open file; a child's is another one."""
    with contextlib.suppress(OSError):
        return os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    return None


@contextlib.contextmanager
def going_first() -> Iterator[None]:
    """Let this process run whenever it can, where that is allowed: what it measures is not its own wait for a core."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
