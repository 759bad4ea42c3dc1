"""The reaper of one ephemeral cache: a program of its own, which imports nothing of shmcache; `reaper.py` starts it.

It sleeps in the kernel until no byte of the process table is locked, then removes the files of the cache, and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys


def main() -> None:
    """Be the reaper that standard input describes, in a child: the parent returns, with status 1 if that cannot be."""
    fd, inode, setup, reaper, lines, paths = json.load(sys.stdin)
    if os.fstat(fd).st_ino != inode:
        sys.exit(f"descriptor {fd} is not the lock file {paths[-1]}")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    if os.fork():
        os._exit(0)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, reaper)  # one reaper a cache
    except OSError:
        return
    wait_and_remove(fd, setup, lines, paths)


def wait_and_remove(fd: int, setup: int, lines: int, paths: list[str]) -> None:
    """Remove `paths` once nobody locks any of the first `lines` bytes; not if the lock file is unlinked by then."""
    while True:
        fcntl.lockf(fd, fcntl.LOCK_EX, lines, 0)
        fcntl.lockf(fd, fcntl.LOCK_UN, lines, 0)
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, setup)
        if os.fstat(fd).st_nlink == 0:
            return
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, lines, 0)
        except OSError:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, setup)
            continue
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return


if __name__ == "__main__":
    main()
