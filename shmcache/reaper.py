"""What unlinks an ephemeral cache when its last process is killed, and so cannot do it itself.

A process of its own sleeps in the kernel until no byte of the process table is locked, then removes the files. It
imports nothing of shmcache, inherits only the lock file, and outlives the process group that started it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

from shmcache.engine.bytelock import REAPER_BYTE, SETUP_BYTE, is_byte_locked

__all__ = ["start_reaper"]

_PROGRAM = """
import fcntl, json, os, sys
if os.fork():
    os._exit(0)
fd, inode, setup, reaper, lines, paths = json.loads(sys.argv[1])
if os.fstat(fd).st_ino != inode:
    os._exit(1)  # not the lock file
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, reaper)  # one reaper a cache
except OSError:
    os._exit(0)
while True:
    fcntl.lockf(fd, fcntl.LOCK_EX, lines, 0)
    fcntl.lockf(fd, fcntl.LOCK_UN, lines, 0)
    fcntl.lockf(fd, fcntl.LOCK_EX, 1, setup)
    if os.fstat(fd).st_nlink == 0:
        break
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, lines, 0)
    except OSError:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, setup)
        continue
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            pass
    break
"""


def start_reaper(lock_fd: int, lines: int, paths: list[str]) -> None:
    """Start a reaper for the cache of this lock file, unless it has one. `paths` are removed, the lock file last."""
    if is_byte_locked(lock_fd, REAPER_BYTE):
        return
    argument = json.dumps([lock_fd, os.fstat(lock_fd).st_ino, SETUP_BYTE, REAPER_BYTE, lines, paths])
    try:
        # It forks and its first process exits at once, so nobody has a child to wait for.
        subprocess.run(
            [_python(), "-I", "-S", "-c", _PROGRAM, argument],
            pass_fds=(lock_fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger("shmcache").warning(
            "no reaper could be started for the ephemeral cache (%s): if its last process is killed, its files stay "
            "until the next process creates the cache or `shmcache unlink` removes it",
            error,
        )


def _python() -> str:
    """The interpreter; an application server that embeds Python puts itself into `sys.executable`."""
    if os.path.basename(sys.executable or "").startswith("python"):
        return sys.executable
    return os.path.join(sys.exec_prefix, "bin", "python3")
