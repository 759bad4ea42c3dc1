"""Signal handlers that raise, at random moments within operations, while another process goes on working.

As KeyboardInterrupt, gunicorn's abort of a worker or an alarm do. Somebody may keep the exception, and with it every
frame it passed through: nothing may depend on those being collected.
"""

from __future__ import annotations

import itertools
import mmap
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import shmcache
from shmcache import Cache, is_compiled
from tests.processes import Family, no_gc
from tests.torture.campaign import Part, Trial

LONGEST = 0.0008  # seconds until an alarm
AGAIN = 0.05  # seconds until the next one: Python drops what strikes in a finalizer
PATIENCE = 2.0  # seconds for the other process to go on
ROUND = 100  # interrupts
PACKAGE = f"{Path(shmcache.__file__).parent}/"
# What is all compiled can only be struck while it waits for a lock, so the others are chosen more often.
IN_PYTHON = ("batch", "items", "check", "attach", "stats")


class Alarm(Exception):
    """What a handler of SIGALRM may raise."""


KINDS = (Alarm, KeyboardInterrupt, SystemExit)  # the last as gunicorn does to a worker that takes too long


class Alarms:
    """A handler that raises while it is armed."""

    def __init__(self) -> None:
        self.armed: type[BaseException] | None = None
        signal.signal(signal.SIGALRM, self.ring)

    def ring(self, *_: object) -> None:
        if self.armed:
            raise self.armed

    def interrupt(self, work: Callable[[], object], after: float, kind: type[BaseException]) -> BaseException:
        """Do the work again and again until an alarm strikes it."""
        try:
            self.armed = kind
            signal.setitimer(signal.ITIMER_REAL, after, AGAIN)
            while True:
                work()
        except KINDS as alarm:
            self.armed = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            return alarm


def struck_within(error: BaseException) -> bool:
    """Whether an exception went through the package. Frames of compiled code have the name it was compiled by."""
    names = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith((PACKAGE, "shmcache/")) for name in names)


def rounds(trial: Trial) -> Iterator[None]:
    """A round is a hundred interrupts, within operations or between two of them."""
    sys.unraisablehook = lambda unraisable: None  # what strikes in a finalizer would be printed
    alarms = Alarms()
    beats = mmap.mmap(-1, 8)

    def work_elsewhere() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in itertools.count():
            cache.set("elsewhere", number)
            beats[:] = number.to_bytes(8, "big")

    def goes_on() -> bool:
        before, began = bytes(beats), time.monotonic()
        while bytes(beats) == before:
            if time.monotonic() - began > PATIENCE:
                return False
            time.sleep(0.0001)  # else that process might have no core to go on
        return True

    options = {"max_bytes": "2MB", "max_entries": 500, "shards": 2, "lock_timeout": PATIENCE}
    with no_gc(), trial.cache(**options) as cache, Family() as family:
        cache.batch(), cache.stats()  # Python makes another exception of one that strikes in the import of a module
        family.fork(work_elsewhere)
        while True:
            for _ in range(ROUND):
                name, work, allowed = operation(trial, cache)
                kept = alarms.interrupt(work, trial.rng.random() * LONGEST, trial.rng.choice(KINDS))
                assert goes_on(), f"{name} was interrupted, and another process waits"
                assert cache.get("key") in allowed, name
                cache.set_many(dict.fromkeys(("counter", "a", "b", "c"), 0))  # this one can work as well, in each shard
                trial.count("interrupts" if struck_within(kept) else "between operations")
                del kept
            assert cache.check() == []
            yield


def operation(trial: Trial, cache: Cache) -> tuple[str, Callable[[], object], tuple[object, ...]]:
    """Something to interrupt: its name, itself, and what `key` may be afterwards."""
    number = trial.rng.randrange(1 << 30)
    size = trial.rng.choice((1, 100, 5000))
    before, after = f"{number}:" * size, f"{number + 1}:" * size
    cache.set("key", before)
    several = dict.fromkeys(("a", "b", "key"), after)

    def batch() -> None:
        with cache.batch() as batch:
            batch.delete("key")
            batch.incr("counter", initial=0)
            batch.set("key", after)

    def delete() -> None:
        cache.delete("key")
        cache.set("key", after)

    def pop() -> None:
        cache.pop("key", None)
        cache.set("key", after)

    choices: dict[str, tuple[Callable[[], object], tuple[object, ...]]] = {
        "set": (lambda: cache.set("key", after), (before, after)),
        "get": (lambda: cache.get("key"), (before,)),
        "delete": (delete, (before, after, None)),
        "pop": (pop, (before, after, None)),
        "incr": (lambda: cache.incr("counter", initial=0), (before,)),
        "touch": (lambda: cache.touch("key", 1000), (before,)),
        "set_many": (lambda: cache.set_many(several), (before, after)),
        "batch": (batch, (before, after, None)),
        "add": (lambda: cache.add("key", after), (before,)),
        "items": (lambda: list(cache.items()), (before,)),
        "purge": (cache.purge, (before,)),
        "check": (cache.check, (before,)),
        "attach": (lambda: Cache(cache.name).close(), (before,)),
        "stats": (cache.stats, (before,)),
    }
    name = trial.rng.choice([*choices, *IN_PYTHON, *IN_PYTHON])
    return name, *choices[name]


PART = Part(
    claim="an exception raised by a signal handler, wherever it strikes, leaves no lock taken and no half change",
    rounds=rounds,
    short=20 if is_compiled() else 5,
)
