"""Unrelated processes that attach, work, and leave in every way there is: nothing is unlinked, leaked or printed.

Each is an interpreter of its own, with every warning an error, on any of the Pythons that have the package
(SHMCACHE_OTHER_PYTHONS). What may leak is counted where it lies: in /dev/shm, in the process table, in the kernel's
table of locks, and in this process, which stays attached.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shmcache import Cache, segment
from shmcache.engine import bytelock
from tests.processes import DEADLINE, environment
from tests.torture.campaign import Part, Trial

AT_ONCE = 8
PYTHONS = [
    sys.executable,
    *(python for python in os.environ.get("SHMCACHE_OTHER_PYTHONS", "").split(os.pathsep) if python),
]
CHECK_EACH = 25  # rounds

PROGRAM = """
import os, signal, sys, threading
from shmcache import Cache
name, number, way = sys.argv[1:]
cache = Cache(name)
cache.set(("own", number), [number, way])
assert cache.get(("own", number)) == [number, way]
if way == "fork":
    child = os.fork()
    if child == 0:
        assert cache.get(("own", number)) == [number, way]
        cache.delete(("own", number))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
elif way == "thread":
    begun = threading.Semaphore(0)
    def work():
        while True:
            cache.set(("own", number), way)
            begun.release()
    threading.Thread(target=work, daemon=True).start()
    begun.acquire()
cache.incr("done", initial=0)
if way == "close":
    cache.close()
elif way == "exit":
    sys.exit(3)
elif way == "_exit":
    os._exit(4)
elif way == "terminate":
    signal.raise_signal(signal.SIGTERM)
elif way == "kill":
    signal.raise_signal(signal.SIGKILL)
elif way == "raise":
    raise RuntimeError("meant")
"""

# Ways to leave, and the exit code of each. "killed" is a SIGKILL from outside at any moment since the process began.
WAYS = {
    "end": 0,
    "close": 0,
    "fork": 0,
    "thread": 0,
    "exit": 3,
    "_exit": 4,
    "raise": 1,
    "terminate": -signal.SIGTERM,
    "kill": -signal.SIGKILL,
    "killed": -signal.SIGKILL,
}


@dataclass(frozen=True)
class Belongings:
    """What coming and going must not change."""

    files: dict[str, int]  # of the cache, and their inodes
    descriptors: dict[str, str]  # of this process
    locked: dict[int, int] | None  # bytes of the lock file, and by whom
    attached: list[int]  # pids

    @classmethod
    def of(cls, cache: Cache) -> Belongings:
        files = Path(segment.DIRECTORY).glob(f"*{segment.file_name(cache.name)}*")
        return cls(
            files={path.name: path.stat().st_ino for path in files},
            descriptors=_descriptors(),
            locked=bytelock.holders(segment.lock_path(cache.name)),
            attached=[process.pid for process in cache.stats().attached],
        )


def _descriptors() -> dict[str, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[path.name] = os.readlink(path)
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def rounds(trial: Trial) -> Iterator[None]:
    """A round is some processes that run at the same time."""
    with trial.cache(max_bytes="1MB", max_entries=512, shards=2) as cache:
        trial.count("Pythons", len(PYTHONS))
        cache.set("kept", "value")
        cache.incr("done", initial=0, delta=0)
        before = Belongings.of(cache)
        done = unsure = 0
        for number in range(1 << 40):
            ways = [trial.rng.choice(list(WAYS)) for _ in range(AT_ONCE)]
            come_and_go(trial, cache, number, ways)
            unsure += ways.count("killed")
            done += AT_ONCE - ways.count("killed")
            assert Belongings.of(cache) == before
            assert psutil.Process().children() == []
            assert cache.get("kept") == "value"
            assert done <= cache.get("done") <= done + unsure
            if number % CHECK_EACH == 0:
                assert cache.check() == []
            yield


def come_and_go(trial: Trial, cache: Cache, number: int, ways: list[str]) -> None:
    processes = []
    for each, way in enumerate(ways):
        python = trial.rng.choice(PYTHONS)
        command = [python, "-X", "dev", "-W", "error", "-c", PROGRAM, cache.name, f"{number}-{each}", way]
        processes.append(
            subprocess.Popen(
                command, cwd="/", env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    began = time.monotonic()
    moments = sorted((trial.rng.random() * 0.5, each) for each, way in enumerate(ways) if way == "killed")
    for moment, each in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        processes[each].kill()
    for process, way in zip(processes, ways, strict=True):
        try:
            _, errors = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
            process.wait()
        expected: tuple[Any, ...] = (WAYS[way], 0) if way == "killed" else (WAYS[way],)
        assert process.returncode in expected, f"{way}: {process.returncode}\n{errors}"
        if way == "raise":
            assert errors.startswith("Traceback"), errors
            assert errors.endswith("\nRuntimeError: meant\n"), errors
            assert errors.count("Traceback") == 1, errors
            assert "Warning" not in errors, errors
        else:
            assert errors == "", f"{way}: {errors}"
        trial.count("processes")


PART = Part(
    claim="processes that come and go, in whatever way, unlink nothing, leave nothing behind and print nothing",
    rounds=rounds,
    short=4,
    share=2.0,
)
