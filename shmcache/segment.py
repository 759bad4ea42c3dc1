"""The shared memory of a cache: how it is named, created, validated, attached to and unlinked, without races.

A cache is a segment and a lock file of its user in /dev/shm, and a semaphore for each shard. Creating, attaching and
unlinking exclude each other by a byte of the lock file, which the kernel frees when its holder dies. The segment names
the inode of its lock file, and each segment has a fresh one; if either is unlinked behind our back, everybody moves on
to a new pair.

The segment is an ordinary POSIX one, as `multiprocessing.shared_memory.SharedMemory` makes, but opened through
posix_ipc: that never meets the resource tracker, whose process would unlink the segment when an attaching process
exits (Python before 3.13), and it gives the descriptor that reserving and checking need.

A process has one attachment to a cache, however many `Cache` objects use it, because closing a second descriptor of
the lock file would drop the locks of the first.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import posix_ipc

from shmcache.engine import layout
from shmcache.engine.bytelock import (
    REAPER_BYTE,
    Guard,
    forked_within,
    is_byte_locked,
    is_setting_up,
    under_setup_lock,
)
from shmcache.engine.layout import Geometry
from shmcache.engine.membership import Member, Registry
from shmcache.engine.primitives import load, process_epoch, store
from shmcache.engine.repair import inspect_locked
from shmcache.engine.shard import Shard
from shmcache.engine.store import MAX_TTL_NS, is_compiled
from shmcache.errors import (
    CacheNotFound,
    CorruptSegment,
    GeometryMismatch,
    IncompatibleSegment,
    LockTimeout,
    SegmentTooLarge,
    SharedMemoryUnavailable,
    ShmcacheError,
)
from shmcache.memory import shortage
from shmcache.reaper import start_reaper
from shmcache.semaphore import Sleeper

log = logging.getLogger("shmcache")

__all__ = ["Attachment", "Wish", "attach", "is_left_over", "names", "unlink"]

DIRECTORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
MAX_NAME = 100
RESERVE_STEP = 4 * 2**20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_LOCK_SUFFIX = "~lock"
_NONBLOCK = os.O_NONBLOCK if sys.platform == "linux" else 0  # shm_open need not take it elsewhere


@dataclass(frozen=True)
class Wish:
    """What a caller asks for; None where any value of a live cache will do."""

    name: str
    create: bool = True
    max_bytes: int | None = None
    max_entries: int | None = None
    shards: int | None = None
    eviction: str | None = None
    default_ttl_ns: int | None = None  # 0 for no expiry
    ephemeral: bool = False
    timeout: float = 5.0  # seconds to wait for others who create or attach

    def geometry(self) -> Geometry:
        """The geometry a new cache gets."""
        return Geometry.plan(
            64 * 2**20 if self.max_bytes is None else self.max_bytes,
            self.max_entries,
            self.shards,
            self.eviction or "lru",
        )


class Attachment:
    """This process's view of one cache: the mapping, the lock file, the process table and the shards."""

    def __init__(self, name: str, segment_fd: int, lock_fd: int, size: int) -> None:
        self.name = name
        self.segment_fd = segment_fd
        self.lock_fd = lock_fd
        self._identities = (_file(segment_fd)[0], _file(lock_fd)[0])
        self._detached = False
        self.left_to_parent = False
        self.users = 0
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()  # the `Cache` objects that work on it
        self.is_lost = False  # and that was logged
        self.data = memoryview(mmap.mmap(segment_fd, size))
        self.words = self.data.cast("Q")
        _all_attachments.add(self)

    def open(self, geometry: Geometry) -> None:
        """Make the parts that work on the segment; the header must be filled in."""
        self.geometry = geometry
        self.registry = Registry(self.words, self.lock_fd, geometry.processes)
        self.member = Member(self.words, self.registry)
        # Read once: what the header says later on may be nonsense.
        self.ephemeral = bool(load(self.words, layout.H_FLAGS) & layout.FLAG_EPHEMERAL)
        self.default_ttl_ns = load(self.words, layout.H_DEFAULT_TTL)
        self.secret = (load(self.words, layout.H_SECRET), load(self.words, layout.H_SECRET + 1))
        self.sleepers = [_sleeper(self.name, number) for number in range(geometry.shards)]
        self.guard = Guard(self.lock_fd)
        self.shards = [
            Shard(
                self.words, self.data, geometry, number, self.secret, self.member, sleeper, self.guard, inspect_locked
            )
            for number, sleeper in enumerate(self.sleepers)
        ]

    def after_fork(self) -> None:
        """In a forked child: do nothing in the parent's name.

        A child that a signal handler forked in the midst of an operation may return from the handler, and would go on
        with it, in a section that is the parent's. Uncompiled, what it then stores is an error, and it attaches anew.
        """
        if hasattr(self, "member"):  # otherwise it was just being opened
            self.member.disinherit()
        within = is_setting_up() or any(shard.is_entered() for shard in getattr(self, "shards", ()))
        if within and not is_compiled():
            self.left_to_parent = True
            self.words.release()
            self.data.release()

    def is_current(self) -> bool:
        """Whether both files still have their names, and this process its descriptors (a daemon may close them all)."""
        if self.left_to_parent:
            return False
        files = (_file(self.segment_fd), _file(self.lock_fd))
        return all(names and file == known for (file, names), known in zip(files, self._identities, strict=True))

    def disown(self) -> None:
        """Forget descriptors that somebody has closed: their numbers, and the locks that went with them, are lost."""
        if self.left_to_parent:
            self.close_files()  # before the lock file is opened again, for that drops what the process has locked
            return
        owned = (_file(self.segment_fd)[0] == self._identities[0], _file(self.lock_fd)[0] == self._identities[1])
        if all(owned):
            return
        # The mapping has a duplicate of its descriptor, and freeing the one would close the number of the other.
        _kept.append(self.data)
        if not owned[0]:
            self.segment_fd = -1
        if not owned[1]:
            self.lock_fd = -1
            self.member.forget()

    def check(self, wish: Wish) -> None:
        """Raise GeometryMismatch unless the live cache is what the caller asked for, as far as it asked."""
        here = self.geometry
        asked = {"max_bytes": wish.max_bytes, "max_entries": wish.max_entries, "shards": wish.shards}
        asked["eviction"] = wish.eviction  # type: ignore[assignment]
        differing = {key: value for key, value in asked.items() if value not in (None, getattr(here, key))}
        if differing:
            wanted = ", ".join(f"{key}={value!r}" for key, value in differing.items())
            live = ", ".join(f"{key}={getattr(here, key)!r}" for key in differing)
            raise GeometryMismatch(
                f"a live cache {self.name!r} has {live}, but {wanted} was asked for: attach without these arguments, "
                f"use another name, or remove the live one with `shmcache unlink {self.name}`"
            )

    def detach(self) -> None:
        """One user less; the last one gives the process's place back, and unlinks an ephemeral cache nobody uses."""
        if self.users == 1 and not self.left_to_parent:
            self._wait_for_own_threads()
        self.users -= 1
        if self.users > 0 or self._detached:
            return
        self._detached = True
        if _attachments.get(self.name) is self:
            del _attachments[self.name]
        self.disown()
        self.member.resign()
        removable = self.ephemeral and self.is_current()
        self.registry.fd = self.guard.fd = -1  # the number may be another file's soon
        self.close_files()
        if removable:
            with contextlib.suppress(Exception):
                _remove_if_unused(self.name, self._identities[1])
        # The views of the mapping go with the last object that has one; an mmap cannot be closed under a view.

    def forget_memory(self) -> None:
        """Drop all views of the mapping that are reached from here, once the last user has detached."""
        if self._detached:
            self.shards = []
            self.registry.words = self.words = self.data = memoryview(b"").cast("Q")
            del self.member

    def _wait_for_own_threads(self) -> None:
        """Let no thread of this process take a lock any more, and wait for one that has: nobody could tell it lives.

        Compiled code lets no other thread run while it has a lock.
        """
        if is_compiled():
            return
        fd = self.guard.fd
        self.guard.close()
        try:
            for shard in self.shards:
                shard.wait_for_own_thread()
        except BaseException:  # it is this very thread, interrupted by a signal handler or a finalizer
            self.guard.fd = fd
            raise

    def close_files(self) -> None:
        """Close the descriptors."""
        for fd in (self.segment_fd, self.lock_fd):
            if fd >= 0:
                os.close(fd)
        self.segment_fd = self.lock_fd = -1


def _remove_if_unused(name: str, identity: tuple[int, int] | None) -> None:
    """Remove an ephemeral cache that no process has, neither attached nor forked from one that was."""
    fd = _open_lock_file(name, create=False)
    try:
        if _file(fd)[0] == identity:
            under_setup_lock(fd, 1.0, lambda: _file(fd)[1] and not _is_in_use(fd) and _remove_files(name))
    finally:
        os.close(fd)


def _is_in_use(lock_fd: int) -> bool:
    """Whether anybody else has an ephemeral cache.

    A forked child has the open lock file from its parent, and with it the parent's flock, before it does anything.
    """
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _file(fd: int) -> tuple[tuple[int, int] | None, int]:
    """Device and inode of an open file, and how many names it has; None and 0 if the descriptor is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_nlink


@contextlib.contextmanager
def _standard_descriptors_taken() -> Iterator[None]:
    """Fill what is closed of 0, 1 and 2 meanwhile: a segment there would get whatever is written to stderr."""
    filler: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            filler.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in filler:
            os.close(fd)


_kept: list[memoryview] = []
_attachments: dict[str, Attachment] = {}
_all_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()  # also those that others have replaced
_mutexes: dict[int, threading.RLock] = {}  # one a process: a fork may leave a locked one behind


def process_mutex() -> threading.RLock:
    """What excludes threads of this process from the table of attachments."""
    return _mutexes.setdefault(process_epoch(), threading.RLock())


def attach(wish: Wish) -> Attachment:
    """This process's attachment to the cache, created if need be and allowed."""
    check_name(wish.name)
    with process_mutex():
        attachment = _attachments.get(wish.name)
        if attachment is not None:
            attachment.users += 1  # before a finalizer of its last user can run
            if not attachment.is_current():
                attachment.users -= 1
                attachment.disown()
                attachment = None
        if attachment is None:
            try:
                with _standard_descriptors_taken():
                    attachment = _attachments[wish.name] = _attach(wish)
            except ShmcacheError:
                raise
            except (OSError, posix_ipc.Error) as error:
                raise _explained(error, wish.name) from error
            attachment.users = 1
        try:
            attachment.member.join(wish.timeout)  # a forked child has it from its parent, whose line is not the child's
            attachment.check(wish)
        except BaseException:
            attachment.detach()
            raise
        return attachment


def release(attachment: Attachment) -> None:
    """Undo one `attach`."""
    with process_mutex():
        attachment.detach()


def unlink(name: str, timeout: float = 5.0) -> bool:
    """Remove the files of a cache; whether there were any. Processes that have it attached move to a new one."""
    check_name(name)
    with process_mutex():
        attachment = _attachments.get(name)
        if attachment is not None and attachment.is_current():
            under_setup_lock(attachment.lock_fd, timeout, partial(_remove_files, name))
            if attachment.is_current():
                raise PermissionError(
                    f"cache {name!r} belongs to uid {os.fstat(attachment.segment_fd).st_uid}, and this process, which "
                    f"has it from before it became uid {os.geteuid()}, may not unlink it: do so as that user"
                )
            return True
        try:
            fd = _open_lock_file(name, create=False)
        except CacheNotFound:
            return _remove_files(name)
        try:
            return under_setup_lock(fd, timeout, partial(_remove_files, name))
        finally:
            os.close(fd)


def is_left_over(name: str, timeout: float) -> bool:
    """Whether nobody has an ephemeral cache any more, nor a reaper that will remove it. Attaching would remove it.

    Raises LockTimeout when attaching would have to wait for longer than `timeout`, CacheNotFound if there is none.
    """
    check_name(name)
    with process_mutex():
        if name in _attachments:
            return False  # it is in use here, and closing a second descriptor would drop the locks of the first
        fd = _open_lock_file(name, create=False)
        try:
            return under_setup_lock(fd, timeout, partial(_has_nobody, name, fd, timeout))
        finally:
            os.close(fd)


def _has_nobody(name: str, lock_fd: int, timeout: float) -> bool:
    if not is_byte_locked(lock_fd, REAPER_BYTE):
        return not _is_in_use(lock_fd)
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:  # the reaper has it to itself, for a moment
            if time.monotonic() > deadline:
                raise LockTimeout(
                    f"the reaper of the ephemeral cache {name!r} has kept everybody out for {timeout} s: look for a "
                    f"stopped process (SIGSTOP) with `shmcache doctor {name}`"
                ) from None
        time.sleep(0.0005)


def names() -> list[str]:
    """The names of all caches of this user. Anybody may put files of any name beside them, even with control codes."""
    prefix = file_name("")
    found = (path.name[len(prefix) : -len(_LOCK_SUFFIX)] for path in DIRECTORY.glob(f"{prefix}*{_LOCK_SUFFIX}"))
    return sorted(name for name in found if len(name) <= MAX_NAME and _NAME.match(name))


def check_name(name: str) -> None:
    """Raise TypeError or ValueError unless `name` can name a cache."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a cache is a str, not {type(name).__name__}")
    if len(name) > MAX_NAME or not _NAME.match(name):
        raise ValueError(
            f"{name[: MAX_NAME + 1]!r} cannot name a cache: use 1 to {MAX_NAME} ASCII letters, digits, '.', '_' or "
            f"'-', beginning with a letter or digit"
        )


def file_name(name: str) -> str:
    """The file name of a segment; the user is part of it, so that users do not collide."""
    return f"shmcache-{os.geteuid()}-{name}"


def lock_path(name: str) -> Path:
    return DIRECTORY / (file_name(name) + _LOCK_SUFFIX)


# --- opening --------------------------------------------------------------------------------------------------------
def _open_if_named(wish: Wish, lock_fd: int) -> Attachment | None:
    if not _has_name(lock_fd, wish.name):
        return None
    try:
        return _open_segment(wish, lock_fd)
    except BaseException:
        # The lock file of a creation that did not come to its segment: nobody else has done anything with it.
        if wish.create and not os.fstat(lock_fd).st_size and not os.path.lexists(DIRECTORY / file_name(wish.name)):
            with contextlib.suppress(OSError):
                lock_path(wish.name).unlink()
        raise


def _attach(wish: Wish) -> Attachment:
    attachment: Attachment | None = None
    while True:
        lock_fd = _open_lock_file(wish.name, wish.create)
        try:
            attachment = under_setup_lock(lock_fd, wish.timeout, partial(_open_if_named, wish, lock_fd))
            if attachment is None:
                continue  # somebody unlinked it meanwhile: begin again
        except _UsedLockFile:
            continue
        finally:
            if attachment is None:
                os.close(lock_fd)
        try:
            attachment.member.join(wish.timeout)
        except BaseException:
            attachment.close_files()
            raise
        if not attachment.is_current():
            attachment.close_files()
            attachment = None
            continue
        if attachment.ephemeral:
            start_reaper(lock_fd, _file_paths(wish.name, attachment.geometry.shards))
        return attachment


def _open_lock_file(name: str, create: bool) -> int:
    # Non-blocking for the same reason as in `_refuse_strangers`, if somebody puts a file there at this very moment.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    path = lock_path(name)
    _refuse_strangers(path)
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ENOENT and not create:
            raise CacheNotFound(f"there is no cache named {name!r}: `shmcache ls` lists those of this user") from None
        if error.errno in (errno.ELOOP, errno.EACCES, errno.EISDIR, errno.EAGAIN) and os.path.lexists(path):
            raise IncompatibleSegment(
                f"{path} is not a lock file of this user ({error.strerror}): remove it, or use another cache name"
            ) from error
        raise
    try:
        _check_owner(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _explained(error: Exception, name: str) -> ShmcacheError:
    """What to say of an error of the system that opening a cache met."""
    number = getattr(error, "errno", None)
    if number is None:  # posix_ipc leaves it out where it has an exception or a message for it
        kinds = {posix_ipc.ExistentialError: errno.ENOENT, posix_ipc.PermissionsError: errno.EACCES}
        number = kinds.get(type(error), errno.EMFILE)
    what = f"cache {name!r} cannot be opened ({os.strerror(number)})"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return SegmentTooLarge(
            f"{what}: no more files fit into {DIRECTORY}. Remove some, or allow more, `mount -o remount,nr_inodes=... "
            f"{DIRECTORY}`"
        )
    if number == errno.ENOMEM:
        return SegmentTooLarge(
            f"{what}: this process may map no more memory. Use a smaller cache, or raise the limit, "
            f"`ulimit -v unlimited` or systemd `LimitAS=infinity`"
        )
    if number == errno.EFBIG:
        hint = "this process may write no file. Raise the limit, `ulimit -f unlimited` or systemd `LimitFSIZE=infinity`"
    elif number in (errno.EMFILE, errno.ENFILE):
        hint = "a cache takes three files. Close some, or raise the limit, `ulimit -n 1024` or systemd `LimitNOFILE=`"
    elif number in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
        hint = (
            "expected /dev/shm, a tmpfs in which this user may create files. Mount it, `mount -t tmpfs -o mode=1777 "
            "tmpfs /dev/shm`, or see to its mode"
        )
    else:
        hint = "`shmcache doctor` looks for what is wrong"
    return SharedMemoryUnavailable(number, f"{what}: {hint}")


def _refuse_strangers(path: Path) -> None:
    """Raise IncompatibleSegment if what has this name is not a file of this user, without opening it.

    Opening somebody else's file may take as long as they like: who has a lease on it is asked first, for 45 s.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_owner(path.lstat(), path)


def _check_owner(status: os.stat_result, path: Path) -> None:
    user = os.geteuid()
    if stat.S_ISREG(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077 and status.st_nlink <= 1:
        return
    links = f" and {status.st_nlink} names" if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode) else ""
    who = "remove it" if user in (status.st_uid, 0) else f"have uid {status.st_uid} or root remove it"
    raise IncompatibleSegment(
        f"{path} belongs to uid {status.st_uid} with mode {stat.filemode(status.st_mode)}{links}, expected a regular "
        f"file of uid {user} that nobody else may open (0600) and that has no other name: {who}, or use another cache "
        f"name"
    )


def _has_name(fd: int, name: str) -> bool:
    try:
        named = os.stat(lock_path(name), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def _open_segment(wish: Wish, lock_fd: int) -> Attachment:
    path = DIRECTORY / file_name(wish.name)
    _refuse_strangers(path)
    try:
        memory = posix_ipc.SharedMemory("/" + file_name(wish.name), flags=_NONBLOCK)
    except posix_ipc.ExistentialError:
        if not wish.create:
            raise CacheNotFound(
                f"there is no cache named {wish.name!r}: `shmcache ls` lists those of this user"
            ) from None
        return _create(wish, lock_fd)
    except posix_ipc.PermissionsError as error:
        raise IncompatibleSegment(
            f"this user may not open the shared memory {file_name(wish.name)!r}: remove it, or use another cache name"
        ) from error
    try:
        return _open_existing(wish, memory.fd, lock_fd)
    except _HalfCreated:
        # We hold the setup lock, so whoever began is gone.
        os.close(memory.fd)
        if not wish.create:
            raise CorruptSegment(
                f"the creation of cache {wish.name!r} was never finished: `Cache({wish.name!r})` makes it anew, "
                f"`shmcache unlink {wish.name}` removes it"
            ) from None
        posix_ipc.unlink_shared_memory("/" + file_name(wish.name))
        return _create(wish, lock_fd)
    except BaseException:
        os.close(memory.fd)
        raise


class _UsedLockFile(Exception):
    """The lock file had another segment, and has lost its name: begin again with a new one."""


class _HalfCreated(Exception):
    """The segment was never completed, or belongs to a lock file that is gone."""


def _open_existing(wish: Wish, fd: int, lock_fd: int) -> Attachment:
    status = os.fstat(fd)
    _check_owner(status, DIRECTORY / file_name(wish.name))
    header_bytes = layout.HEADER_WORDS * 8
    if status.st_size == 0:
        raise _HalfCreated
    if status.st_size < header_bytes:
        raise IncompatibleSegment(
            f"the shared memory {file_name(wish.name)!r} has {status.st_size} bytes and is not a cache: remove it with "
            f"`shmcache unlink {wish.name}`, or use another name"
        )
    header = memoryview(os.pread(fd, header_bytes, 0)).cast("Q")
    magic = header[layout.H_MAGIC]
    if magic == 0 and (header[layout.H_VERSION] == layout.LAYOUT_VERSION or not any(header)):
        raise _HalfCreated  # `_create` writes the version first and the magic word last
    if magic == int.from_bytes(layout.MAGIC.to_bytes(8, "little"), "big"):
        raise IncompatibleSegment(f"cache {wish.name!r} was created with the other byte order")
    if magic != layout.MAGIC:
        raise IncompatibleSegment(
            f"the shared memory {file_name(wish.name)!r} is not a cache (it begins with {magic:#018x}): remove it with "
            f"`shmcache unlink {wish.name}`, or use another name"
        )
    if header[layout.H_VERSION] != layout.LAYOUT_VERSION:
        raise IncompatibleSegment(
            f"cache {wish.name!r} has layout version {header[layout.H_VERSION]}, this is a build for version "
            f"{layout.LAYOUT_VERSION}: stop the processes of the other one, then `shmcache unlink {wish.name}`"
        )
    if header[layout.H_LOCK_FILE] != os.fstat(lock_fd).st_ino:
        raise _HalfCreated  # its lock file was removed by hand; those who use it will notice and come here
    geometry = _read_geometry(header, status.st_size, wish.name)
    compiled = bool(header[layout.H_FLAGS] & layout.FLAG_COMPILED)
    if compiled is not is_compiled():
        kinds = ("uncompiled", "compiled")
        raise IncompatibleSegment(
            f"cache {wish.name!r} is used by {kinds[compiled]} processes and this one is {kinds[not compiled]}: "
            f"they lock in different ways. Install shmcache alike everywhere (is SHMCACHE_PURE set?), use another "
            f"name, or, if nobody uses it any more, `shmcache unlink {wish.name}`"
        )
    attachment = Attachment(wish.name, fd, lock_fd, status.st_size)
    attachment.open(geometry)
    if attachment.ephemeral:
        if wish.create and not _is_in_use(lock_fd):
            raise _HalfCreated  # its last process was killed, and so was its reaper
        fcntl.flock(lock_fd, fcntl.LOCK_SH)
    return attachment


def _read_geometry(header: memoryview, size: int, name: str) -> Geometry:
    policies = {number: policy for policy, number in layout.POLICIES.items()}
    geometry = Geometry(
        max_bytes=header[layout.H_BYTES],
        max_entries=header[layout.H_ENTRIES],
        shards=header[layout.H_SHARDS],
        slots=header[layout.H_SLOTS],
        blocks=header[layout.H_BLOCKS],
        processes=header[layout.H_PROCESSES],
        eviction=policies.get(header[layout.H_EVICTION], "unknown"),
    )
    try:
        sound = 0 < geometry.shards <= layout.MAX_SHARDS and geometry == Geometry.plan(
            geometry.max_bytes, geometry.max_entries, geometry.shards, geometry.eviction
        )
    except (ValueError, OverflowError):
        sound = False
    sound &= header[layout.H_FLAGS] <= layout.FLAG_COMPILED | layout.FLAG_EPHEMERAL
    sound &= header[layout.H_DEFAULT_TTL] <= MAX_TTL_NS
    if not sound or geometry.eviction == "unknown" or size != geometry.file_bytes:
        raise CorruptSegment(
            f"the header of cache {name!r} does not describe its {size} bytes ({geometry}): it was truncated or "
            f"overwritten; remove it with `shmcache unlink {name}`"
        )
    return geometry


# --- creating -------------------------------------------------------------------------------------------------------
def _create(wish: Wish, lock_fd: int) -> Attachment:
    # Whoever has the segment of before may be locking bytes of this lock file, so each segment gets a fresh one.
    if os.fstat(lock_fd).st_size:
        lock_path(wish.name).unlink(missing_ok=True)
        raise _UsedLockFile
    os.ftruncate(lock_fd, 1)
    fd = -1
    epoch = process_epoch()
    try:
        geometry = wish.geometry()
        size = geometry.file_bytes
        fd = posix_ipc.SharedMemory("/" + file_name(wish.name), posix_ipc.O_CREX, mode=0o600).fd
        _reserve(fd, size, wish)
        attachment = Attachment(wish.name, fd, lock_fd, size)
        words = attachment.words
        flags = (layout.FLAG_COMPILED if is_compiled() else 0) | (layout.FLAG_EPHEMERAL if wish.ephemeral else 0)
        for word, value in (
            (layout.H_VERSION, layout.LAYOUT_VERSION),
            (layout.H_FLAGS, flags),
            (layout.H_BYTES, geometry.max_bytes),
            (layout.H_ENTRIES, geometry.max_entries),
            (layout.H_SHARDS, geometry.shards),
            (layout.H_SLOTS, geometry.slots),
            (layout.H_BLOCKS, geometry.blocks),
            (layout.H_PROCESSES, geometry.processes),
            (layout.H_EVICTION, layout.POLICIES[geometry.eviction]),
            (layout.H_SECRET, secrets.randbits(64)),
            (layout.H_SECRET + 1, secrets.randbits(64)),
            (layout.H_CREATED, time.time_ns()),
            (layout.H_CREATOR, os.getpid()),
            (layout.H_DEFAULT_TTL, wish.default_ttl_ns or 0),
            (layout.H_LOCK_FILE, os.fstat(lock_fd).st_ino),
        ):
            store(words, word, value)
        attachment.open(geometry)
        if process_epoch() != epoch:
            raise forked_within()  # by a signal handler: the cache is the parent's, and perhaps in use by now
        for shard in attachment.shards:
            shard.format(secrets.randbits(60) << 1)
        if not all(sleeper.create() for sleeper in attachment.sleepers):
            log.warning(
                "no semaphores could be created for cache %r: who waits for a lock is not woken, but looks again after "
                "half a millisecond",
                wish.name,
            )
        if wish.ephemeral:
            fcntl.flock(lock_fd, fcntl.LOCK_SH)
        store(words, layout.H_MAGIC, layout.MAGIC)
        return attachment
    except BaseException:
        if fd >= 0:
            os.close(fd)
        if process_epoch() == epoch:
            _remove_files(wish.name)
        raise


def _reserve(fd: int, size: int, wish: Wish) -> None:
    """Give the segment all its memory now: a full /dev/shm is an error here, not a SIGBUS later."""
    room = os.statvfs(DIRECTORY)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    max_bytes = wish.geometry().max_bytes
    asked = f"cache {wish.name!r} asks for {max_bytes:,} bytes, but"
    enough = _round_size(total - free + max_bytes)
    no_room = SegmentTooLarge(
        f"{asked} {DIRECTORY} has {free:,} free of {total:,}. Ask for a smaller max_bytes, or make it larger: "
        f"Docker `--shm-size={enough}` (64 MB is its default); Kubernetes an emptyDir volume with `medium: Memory` and "
        f"`sizeLimit: {enough.upper()}i` mounted at /dev/shm; otherwise `mount -o remount,size={enough} /dev/shm`"
    )
    if total and size > free:
        raise no_room
    if (short := shortage(size)) is not None:  # asking the kernel for it would wake the OOM killer
        raise SegmentTooLarge(
            f"{asked} the memory limit of {short.whose}, {short.limit:,} bytes, leaves {short.left:,}. Ask for a "
            f"smaller max_bytes, or raise the limit: Docker `--memory`, Kubernetes `resources.limits.memory`, systemd "
            f"`MemoryMax=`"
        )
    try:
        if hasattr(os, "posix_fallocate"):
            # In steps, because older kernels undo a step that a signal interrupts: with a timer that ticks, one large
            # step would never be done.
            for start in range(0, size, RESERVE_STEP):
                os.posix_fallocate(fd, start, min(RESERVE_STEP, size - start))
        else:
            os.ftruncate(fd, size)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise SegmentTooLarge(
                f"{asked} this process may not make a file that large: raise the limit, `ulimit -f unlimited` or "
                f"systemd `LimitFSIZE=infinity`"
            ) from error
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise no_room from error
        raise


def _sleeper(name: str, shard: int) -> Sleeper:
    semaphore = f"{file_name(name)}~{shard}"
    return Sleeper(f"/{semaphore}", DIRECTORY / f"sem.{semaphore}")


def _round_size(size: int) -> str:
    """A size of /dev/shm that is no smaller, as Docker and mount take it: a power of two in MiB, or whole GiB."""
    if size > 2**29:
        return f"{-(-size // 2**30)}g"
    return f"{max(2**20, 1 << (size - 1).bit_length()) >> 20}m"


def _file_paths(name: str, shards: int) -> list[str]:
    """Every file a cache may have, the lock file last."""
    semaphores = [str(_sleeper(name, number).path) for number in range(shards)]
    return [str(DIRECTORY / file_name(name)), *semaphores, str(lock_path(name))]


def _remove_files(name: str) -> bool:
    removed = False
    with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        posix_ipc.unlink_shared_memory("/" + file_name(name))
        removed = True
    for number in range(layout.MAX_SHARDS):
        _sleeper(name, number).unlink()
    with contextlib.suppress(FileNotFoundError, PermissionError):
        lock_path(name).unlink()
        removed = True
    return removed


def _after_fork_in_child() -> None:
    for attachment in list(_all_attachments):
        attachment.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _at_exit() -> None:
    """Say that this process leaves. Functions registered earlier, and daemon threads, may still use its caches."""
    for attachment in list(_attachments.values()):
        with contextlib.suppress(Exception):
            if attachment.ephemeral and threading.active_count() == 1:
                attachment.users = 1
                attachment.detach()
            else:  # what is locked is given back by the kernel, and a reaper removes what is ephemeral
                attachment.registry.take_leave()
