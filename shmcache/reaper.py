"""What unlinks an ephemeral cache when its last process is killed, and so cannot do it itself.

A process of its own, `reaper_process.py`, does it. It inherits nothing, and outlives the process group that started it.
Its command line ends with the path of the lock file, for people; the rest it reads from its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from shmcache.engine.bytelock import REAPER_BYTE, SETUP_BYTE, is_byte_locked
from shmcache.log import warn

__all__ = ["start_reaper"]

_PROGRAM = Path(__file__).absolute().with_name("reaper_process.py")


def start_reaper(lock_fd: int, paths: list[str]) -> None:
    """Start a reaper for the cache of this lock file, unless it has one. `paths` are removed, the lock file last."""
    if is_byte_locked(lock_fd, REAPER_BYTE):
        return
    facts = json.dumps([os.fstat(lock_fd).st_ino, SETUP_BYTE, REAPER_BYTE, paths])
    try:
        # It forks and its first process exits at once, so nobody has a child to wait for.
        subprocess.run(
            [_python(), "-I", "-S", str(_PROGRAM), paths[-1]],
            input=facts.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        warn(
            "no reaper could be started for the ephemeral cache (%s): if its last process is killed, its files stay "
            "until the next process creates the cache or `shmcache unlink` removes it",
            error,
        )


def _python() -> str:
    """The interpreter; an application server that embeds Python puts itself into `sys.executable`."""
    if os.path.basename(sys.executable or "").startswith("python"):
        return sys.executable
    return os.path.join(sys.exec_prefix, "bin", "python3")
