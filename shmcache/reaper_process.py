"""The reaper of one ephemeral cache: a program of its own, which imports nothing of shmcache; `reaper.py` starts it.

It sleeps in the kernel until nobody has the lock file of the cache locked, then removes the files, and ends. Whoever
stops a service tells every process of it to terminate, so the reaper stays a while for the others to do so first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys

PATIENCE = 10  # seconds that it goes on for after it was told to terminate


def main() -> None:
    """Be the reaper that standard input describes, in a child: the parent returns."""
    inode, setup, reaper, paths = json.load(sys.stdin)
    try:
        fd = os.open(paths[-1], os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return  # removed already
    if os.fstat(fd).st_ino != inode:
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    signal.signal(signal.SIGTERM, terminate_later)
    if os.fork():
        os._exit(0)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, reaper)  # one reaper a cache
    except OSError:
        return
    wait_and_remove(fd, setup, paths)


def terminate_later(*_: object) -> None:
    """Have the kernel end this process when its patience has."""
    signal.alarm(PATIENCE)


def wait_and_remove(fd: int, setup: int, paths: list[str]) -> None:
    """Remove `paths` once nobody has the file locked (flock); not if the lock file is unlinked by then."""
    while True:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_UN)  # who attaches waits for this while it has the setup lock
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, setup)
        if os.fstat(fd).st_nlink == 0:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, setup)
            continue
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return


if __name__ == "__main__":
    main()
