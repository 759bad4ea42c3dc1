"""Locks on bytes of a cache's lock file: everything that takes one, or asks who has one, is in this file.

They are POSIX record locks: each belongs to a process and is gone with it. They do not exclude threads of one process,
which mutexes do here, and they vanish when the process closes any descriptor of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from shmcache.engine.primitives import ATOMIC_BYTE, process_epoch
from shmcache.errors import CacheClosed, LockTimeout

__all__ = [
    "ATOMIC_BYTE",
    "REAPER_BYTE",
    "SETUP_BYTE",
    "Guard",
    "Mutex",
    "forked_within",
    "holders",
    "is_byte_locked",
    "is_setting_up",
    "try_lock_byte",
    "under_setup_lock",
    "unlock_byte",
]

Result = TypeVar("Result")

# The first bytes are those of the process table (`membership.py`); these lie beyond.
SETUP_BYTE = ATOMIC_BYTE - 1  # held while the cache is created, attached to, unlinked, or a line is taken
REAPER_BYTE = ATOMIC_BYTE + 1  # held by the reaper of an ephemeral cache

GUARD_PATIENCE = 0.02  # seconds to wait for a compare-and-swap of another process

_FLOCK = "@qqihh" if sys.platform == "darwin" else "@hhqqi0q"


class Mutex:
    """A lock among threads: `with mutex.lock:`, after `refuse_reentry`, with `mutex.owner` set inside.

    An exception that a signal handler raises can strike between any two lines of Python, and would leave a lock taken
    that Python code takes or gives back. A `with` of a lock in C cannot be struck.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner = 0

    def is_mine(self) -> bool:
        """Whether this thread has the lock."""
        return self.owner == threading.get_ident() and self.lock.locked()

    def refuse_reentry(self) -> None:
        """Raise LockTimeout if this thread has the lock: waiting for itself it would wait for ever."""
        if self.is_mine():
            raise LockTimeout(
                "this thread is in the middle of a cache operation, so a signal handler or finalizer that runs within "
                "it cannot use the cache"
            )


# A mutex may be held by a thread that a fork left behind, so each process has its own. And so has each lock file: who
# waits for one cache holds up nobody at another. (A process has one descriptor of a lock file, so the number will do.)
_setup_mutexes: dict[tuple[int, int], Mutex] = {}
_atomic_mutexes: dict[int, Mutex] = {}


def release_abandoned(locks: Iterable[Mutex | threading.RLock]) -> None:
    """In a forked child: give back what threads of the parent have.

    A signal handler may have forked while this thread waited for one, and would leave it waiting for ever.
    """
    for lock in locks:
        if isinstance(lock, Mutex):
            if lock.lock.locked() and not lock.is_mine():
                lock.lock.release()
        elif not lock._is_owned():  # type: ignore[attr-defined]
            with contextlib.suppress(RuntimeError):  # nobody has it
                lock._release_save()  # type: ignore[attr-defined] # `release` is for owners only


def _after_fork_in_child() -> None:
    release_abandoned([*_setup_mutexes.values(), *_atomic_mutexes.values()])


os.register_at_fork(after_in_child=_after_fork_in_child)


def is_setting_up() -> bool:
    """Whether this thread is in `under_setup_lock`; in a forked child, whether it was when it forked."""
    return any(mutex.is_mine() for mutex in list(_setup_mutexes.values()))


def forked_within() -> LockTimeout:
    """For a child that a signal handler forked in the midst of something, and that goes on as if it were the parent."""
    return LockTimeout(
        "this process was forked in the midst of a cache operation, by a signal handler or finalizer: the operation is "
        "its parent's, who finishes it; do it again here if this process needs it too"
    )


def under_setup_lock(fd: int, timeout: float, work: Callable[[], Result]) -> Result:
    """Do what creating, attaching, unlinking and taking a line exclude each other for, in this process and among all.

    Raises LockTimeout when others take longer than `timeout` seconds, CacheClosed where `fd` was closed meanwhile.
    """
    epoch = process_epoch()
    mutex = _setup_mutexes.setdefault((epoch, fd), Mutex())
    mutex.refuse_reentry()
    try:
        with mutex.lock:
            try:
                mutex.owner = threading.get_ident()
                if process_epoch() != epoch:
                    raise forked_within()  # while this thread waited for the mutex
                _await_setup_byte(fd, timeout)
                result = work()
                if process_epoch() != epoch:
                    raise forked_within()
                return result
            finally:
                # Calls of C functions only: no signal handler runs before they are done.
                try:  # noqa: SIM105
                    fcntl.lockf(fd, fcntl.LOCK_UN, 1, SETUP_BYTE)
                except (OSError, ValueError):
                    pass  # closed, and so unlocked
                mutex.owner = 0
    except (ValueError, RuntimeError):
        if process_epoch() != epoch:
            raise forked_within() from None  # the views of the segment were released, or the mutex was
        raise


def _await_setup_byte(fd: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        while not try_lock_byte(fd, SETUP_BYTE):
            if time.monotonic() > deadline:
                raise LockTimeout(
                    f"somebody has been creating, attaching to or unlinking this cache for {timeout} s, longer "
                    f"than lock_timeout allows: look for a stopped process (SIGSTOP) with `shmcache doctor`"
                )
            time.sleep(0.0005)
    except ValueError:
        raise CacheClosed("the cache was closed by another thread") from None
    except OSError as error:
        if error.errno == errno.EBADF:
            raise CacheClosed("the cache was closed by another thread") from None
        raise


class Guard:
    """What makes a compare-and-swap of uncompiled code atomic, in this process and among all (`primitives.py`)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._inode = os.fstat(fd).st_ino

    @property
    def mutex(self) -> Mutex:
        """To be held, among the threads of this process, from before `take` until after the byte is given back."""
        return _atomic_mutexes.setdefault(process_epoch(), Mutex())

    def take(self) -> bool:
        """Take the byte; False when that lasts too long, for instance because its holder was stopped just here.

        Raises CacheClosed where the descriptor was closed, and may be another file's: what it locks excludes nobody.
        """
        deadline = time.monotonic() + GUARD_PATIENCE
        try:
            if os.fstat(self.fd).st_ino != self._inode:
                raise ValueError
            held = try_lock_byte(self.fd, ATOMIC_BYTE)
        except (OSError, ValueError):
            raise CacheClosed("the lock file of this cache was closed") from None
        while not held and time.monotonic() < deadline:
            time.sleep(0)
            held = try_lock_byte(self.fd, ATOMIC_BYTE)
        return held

    def close(self) -> None:
        """Let no thread of this process take it from now on."""
        self.mutex.refuse_reentry()
        with self.mutex.lock:
            self.fd = -1


def try_lock_byte(fd: int, byte: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def unlock_byte(fd: int, byte: int) -> None:
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, byte)


def is_byte_locked(fd: int, byte: int, count: int = 1) -> bool:
    """Whether another process holds any of these bytes; the own process's locks do not show."""
    fields = (byte, count, 0, fcntl.F_WRLCK, os.SEEK_SET)
    if sys.platform != "darwin":  # pragma: no branch - another system
        fields = (fcntl.F_WRLCK, os.SEEK_SET, byte, count, 0)
    answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, *fields)))
    return bool(answer[3 if sys.platform == "darwin" else 0] != fcntl.F_UNLCK)


def holders(path: str) -> dict[int, int] | None:
    """Which bytes of a lock file are locked, and by which processes: their pids as seen from here.

    Processes of another pid namespace do not show. None where the kernel does not tell, or there is no such file.
    """
    try:
        status = os.stat(path)
        file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        with open("/proc/locks") as locks:
            # "1: POSIX ADVISORY WRITE 4711 00:1b:42 0 0"; one who waits has an arrow behind the number.
            found = [fields for fields in map(str.split, locks) if fields[1] == "POSIX" and fields[5] == file]
    except OSError:
        return None
    return {int(fields[6]): int(fields[4]) for fields in found}
