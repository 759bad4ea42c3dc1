"""The descriptors that this process has of the files of caches: how they are opened, shared and closed.

A descriptor belongs to an object from the moment it is open, and is closed when nobody has that object any more; so no
exception leaks one. (A signal handler that raises just then may keep it from being closed: then it is when the next one
is opened.) A process has one descriptor of a lock file, whoever needs it, because closing a second one would drop all
that the process has locked. And a number that somebody else has closed is not closed again: it may be another file's.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Self

import posix_ipc

from shmcache.engine.primitives import process_epoch

__all__ = ["Descriptor", "LockFile", "is_open", "open_file", "open_lock_file", "open_shared_memory", "standard_taken"]


class Descriptor:
    """An open file that closes itself when it is collected.

    The number belongs to a `FileIO`, whose `close` gives it up and closes it in one call of C. So of several threads
    that close it one does, and nobody closes what has got the number since.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.identity = identity_of(file.fileno())
        former = _newest.get(file.fileno())
        if former is not None and not former.closed:  # somebody else has closed it, or we had not got its number
            _lost.append(former)
            _open.pop(former, None)
        _newest[file.fileno()] = file
        _open[file] = (weakref.ref(self), self.identity)

    def fileno(self) -> int:
        """The number; raises ValueError once it is closed."""
        return self._file.fileno()

    @property
    def closed(self) -> bool:
        """Whether we have closed it."""
        return self._file.closed

    def link_count(self) -> int:
        """How many names the file has; 0 also if somebody has closed the descriptor."""
        try:
            return 0 if self.is_lost() else os.fstat(self.fileno()).st_nlink
        except (OSError, ValueError):
            return 0

    def is_lost(self) -> bool:
        """Whether somebody else has closed it (daemons close all there are), so that its number may be another's.

        That may be the same file, opened anew by us.
        """
        try:
            number = self.fileno()
        except ValueError:  # we have closed it
            return False
        return _newest[number] is not self._file or identity_of(number) != self.identity

    def close_own(self) -> None:
        """Close it, unless somebody else has."""
        if not self.is_lost():
            self._file.close()
            _open.pop(self._file, None)

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, modules may be emptied.
        if hasattr(self, "identity") and not _is_finalizing():
            self.close_own()


class LockFile:
    """The lock file of a cache, open, and whether this process says by an flock that it uses the cache.

    A forked child has the file from its parent, and with it the parent's flock, before it does anything. At the end of
    a `with` block it is closed, unless it has `users`: somebody may keep an exception, and so all that frames refer to.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self.fd = descriptor.fileno()
        self.identity = descriptor.identity
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self.spare: list[Descriptor] = []  # more of the same file: closing one would drop the locks
        self._epoch = process_epoch()
        self._in_use_here = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_unless_used()

    def add_user(self, user: object) -> None:
        """Keep it open until `user` is discarded from `users` and it is closed."""
        self.users.add(user)
        _used[self.identity] = self

    def close_unless_used(self) -> None:
        """Close it if it has no users. The caller excludes other threads that want the same file."""
        if not self.users:
            for descriptor in (self.descriptor, *self.spare):
                descriptor.close_own()
            if _used.get(self.identity) is self:
                del _used[self.identity]

    def is_open(self) -> bool:
        """Whether it can be used: neither we nor others have closed it."""
        return not self.descriptor.closed and not self.descriptor.is_lost()

    def use(self) -> bool:
        """Say that the cache is in use, as long as the file is open. False while a reaper has it to itself to look."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._in_use_here = True
        return True

    def is_in_use(self) -> bool:
        """Whether anybody says so. Asking would take away what this process, or its parent, has said."""
        if self._in_use_here or self._epoch != process_epoch():
            return True
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return False


# Each open file, with the object that it belongs to. One that is lost is kept: collected, it would close its number.
_open: dict[io.FileIO, tuple[weakref.ref[Descriptor], tuple[int, int] | None]] = {}
_newest: dict[int, io.FileIO] = {}  # which of ours got a number last: any other of that number is lost
_lost: list[io.FileIO] = []
_lock_files: weakref.WeakValueDictionary[tuple[int, int] | None, LockFile] = weakref.WeakValueDictionary()
_used: dict[tuple[int, int] | None, LockFile] = {}  # held, or a collector would make us forget one that is still locked


def open_file(path: str, flags: int) -> Descriptor:
    """Open a file that a forked child inherits and another program does not."""
    return _owned(map(os.open, [path], [flags | os.O_CLOEXEC], [0o600]))


def open_shared_memory(name: str, flags: int) -> Descriptor:
    """Open a POSIX shared memory object."""
    return _owned(map(attrgetter("fd"), map(partial(posix_ipc.SharedMemory, flags=flags, mode=0o600), [name])))


def _owned(numbers: Iterator[int]) -> Descriptor:
    _close_unowned()
    # From C to C: no signal handler, which might raise, runs between opening and owning.
    return Descriptor(next(map(io.FileIO, numbers)))


def _close_unowned() -> None:
    """Close what has lost its object without being closed; not a lock file that somebody else has open."""
    for file, (owner, identity) in list(_open.items()):
        try:
            if owner() is None and identity == identity_of(file.fileno()) and identity not in _lock_files:
                file.close()
        except ValueError:  # its finalizer has just closed it
            pass
        if file.closed:
            _open.pop(file, None)


def identity_of(number: int) -> tuple[int, int] | None:
    """Device and inode of an open file, None if the descriptor is closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_lock_file(path: str, flags: int) -> LockFile:
    """The one this process has open, or a new one. The caller excludes other threads that want the same file."""
    if (known := _known(path)) is not None:
        return known
    descriptor = open_file(path, flags)
    known = _lock_files.get(descriptor.identity)
    if known is not None and known.is_open():  # somebody has just given it this name
        known.spare.append(descriptor)
        return known
    lock_file = _lock_files[descriptor.identity] = LockFile(descriptor)
    return lock_file


def is_open(path: str) -> bool:
    """Whether this process has this lock file open."""
    return _known(path) is not None


def _known(path: str) -> LockFile | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    known = _lock_files.get((status.st_dev, status.st_ino))
    return known if known is not None and known.is_open() else None


@contextlib.contextmanager
def standard_taken() -> Iterator[None]:
    """Fill what is closed of 0, 1 and 2 meanwhile: a segment there would get whatever is written to stderr."""
    filler = [open_file(os.devnull, os.O_RDWR)]
    while filler[-1].fileno() <= 2:
        filler.append(open_file(os.devnull, os.O_RDWR))
    filler.pop()
    try:
        yield
    finally:
        for each in filler:
            each.close_own()
