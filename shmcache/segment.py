"""The files of a cache in /dev/shm: their names, whose they are, how they are created, validated and removed.

A cache is a segment and a lock file of its user, and a semaphore for each shard. Creating, attaching and unlinking
exclude each other by a byte of the lock file, the setup lock, which the kernel frees when its holder dies. The segment
names the inode of its lock file, and each segment has a fresh one; if either is unlinked behind our back, everybody
moves on to a new pair. What a process does with the files once it has them is `attachment.py`'s.

The segment is an ordinary POSIX one, as `multiprocessing.shared_memory.SharedMemory` makes, but opened through
posix_ipc: that never meets the resource tracker, whose process would unlink the segment when an attaching process
exits (Python before 3.13), and it gives the descriptor that reserving and checking need.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import sys
import threading
import time
from functools import partial
from typing import NamedTuple

import posix_ipc

from shmcache import descriptors
from shmcache.descriptors import Descriptor, LockFile
from shmcache.engine import layout
from shmcache.engine.bytelock import REAPER_BYTE, forked_within, is_byte_locked, release_abandoned, under_setup_lock
from shmcache.engine.layout import Geometry
from shmcache.engine.primitives import process_epoch, store
from shmcache.engine.store import MAX_TTL_NS, is_compiled
from shmcache.errors import (
    CacheNotFound,
    CorruptSegment,
    IncompatibleSegment,
    LockTimeout,
    SegmentTooLarge,
    SharedMemoryUnavailable,
    ShmcacheError,
)
from shmcache.semaphore import Sleeper

__all__ = [
    "DIRECTORY",
    "MAX_ENTRIES",
    "Unfinished",
    "Wish",
    "check_name",
    "complete",
    "create_segment",
    "explained",
    "file_name",
    "file_paths",
    "has_mutex",
    "is_left_over",
    "is_named",
    "lock_path",
    "mutex_of",
    "names",
    "open_lock_file",
    "open_segment",
    "random_word",
    "remove_files",
    "remove_if_unused",
    "remove_lock_file_of_nothing",
    "remove_segment",
    "replace_used",
    "sleeper",
    "unlink",
    "use",
]

DIRECTORY = "/dev/shm"
if not os.path.isdir(DIRECTORY):
    import tempfile  # seldom

    DIRECTORY = tempfile.gettempdir()
MAX_NAME = 100
MAX_ENTRIES = (1 << 31) - 1  # a slot's number + 1 has 31 bits, for `layout.WHEEL_FIRST` is the next
RESERVE_STEP = 4 * 2**20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_LOCK_SUFFIX = "~lock"
_NONBLOCK = os.O_NONBLOCK if sys.platform == "linux" else 0  # shm_open need not take it elsewhere


class Wish(NamedTuple):
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


_mutexes: dict[tuple[int, str], threading.RLock] = {}  # one a process: a fork may leave a locked one behind


def mutex_of(name: str) -> threading.RLock:
    """What excludes threads of this process from opening and closing the files of a cache, and its attachments."""
    return _mutexes.setdefault((process_epoch(), name), threading.RLock())


os.register_at_fork(after_in_child=lambda: release_abandoned(_mutexes.values()))


def has_mutex() -> bool:
    """Whether this thread has one of them."""
    return any(mutex._is_owned() for mutex in list(_mutexes.values()))  # type: ignore[attr-defined]


def names() -> list[str]:
    """The names of all caches of this user. Anybody may put files of any name beside them, even with control codes."""
    prefix = file_name("")
    found = []
    with contextlib.suppress(OSError):
        found = [file for file in os.listdir(DIRECTORY) if file.startswith(prefix) and file.endswith(_LOCK_SUFFIX)]
    caches = (file[len(prefix) : -len(_LOCK_SUFFIX)] for file in found)
    return sorted(name for name in caches if len(name) <= MAX_NAME and _NAME.match(name))


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


def segment_path(name: str) -> str:
    return os.path.join(DIRECTORY, file_name(name))


def lock_path(name: str) -> str:
    return segment_path(name) + _LOCK_SUFFIX


def sleeper(name: str, shard: int) -> Sleeper:
    """The semaphore of a shard."""
    semaphore = f"{file_name(name)}~{shard}"
    return Sleeper(f"/{semaphore}", os.path.join(DIRECTORY, f"sem.{semaphore}"))


def file_paths(name: str, shards: int) -> list[str]:
    """Every file a cache may have, the lock file last."""
    semaphores = [sleeper(name, number).path for number in range(shards)]
    return [segment_path(name), *semaphores, lock_path(name)]


# --- opening --------------------------------------------------------------------------------------------------------
def open_lock_file(name: str, create: bool) -> LockFile:
    """The lock file of a cache. Raises CacheNotFound, or IncompatibleSegment if it is a stranger's."""
    # Non-blocking for the same reason as in `_refuse_strangers`, if somebody puts a file there at this very moment.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    path = lock_path(name)
    _refuse_strangers(path)
    try:
        lock_file = descriptors.open_lock_file(path, flags)
    except OSError as error:
        if error.errno == errno.ENOENT and not create:
            raise _no_cache(name) from None
        if error.errno in (errno.ELOOP, errno.EACCES, errno.EISDIR, errno.EAGAIN) and os.path.lexists(path):
            raise IncompatibleSegment(
                f"{path} is not a lock file of this user ({error.strerror}): remove it, or use another cache name"
            ) from error
        raise
    try:
        _check_owner(os.fstat(lock_file.fd), path)
    except BaseException:
        lock_file.close_unless_used()
        raise
    return lock_file


def is_named(lock_file: LockFile, name: str) -> bool:
    """Whether it still is the lock file of this cache: only then does its setup lock mean anything."""
    try:
        named = os.stat(lock_path(name), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(lock_file.fd))


class Unfinished(Exception):
    """The segment was never completed, or belongs to a lock file that is gone, or nobody has it any more."""


def open_segment(wish: Wish, lock_file: LockFile) -> tuple[Descriptor, Geometry]:
    """With the setup lock: the segment of a live cache, validated. Raises CacheNotFound, Unfinished and others."""
    name = wish.name
    path = segment_path(name)
    _refuse_strangers(path)
    try:
        segment = descriptors.open_shared_memory("/" + file_name(name), _NONBLOCK)
    except posix_ipc.ExistentialError:
        raise _no_cache(name) from None
    except posix_ipc.PermissionsError as error:
        raise IncompatibleSegment(
            f"this user may not open the shared memory {file_name(name)!r}: remove it, or use another cache name"
        ) from error
    try:
        return segment, _validated(segment, wish, lock_file)
    except BaseException:
        segment.close_own()
        raise


def _validated(segment: Descriptor, wish: Wish, lock_file: LockFile) -> Geometry:
    name = wish.name
    status = os.fstat(segment.fileno())
    _check_owner(status, segment_path(name))
    header = _read_header(segment, status.st_size, name)
    if header[layout.H_LOCK_FILE] != os.fstat(lock_file.fd).st_ino:
        raise Unfinished  # its lock file was removed by hand; those who use it will notice and come here
    geometry = _read_geometry(header, status.st_size, name)
    compiled = bool(header[layout.H_FLAGS] & layout.FLAG_COMPILED)
    if compiled is not is_compiled():
        kinds = ("uncompiled", "compiled")
        raise IncompatibleSegment(
            f"cache {name!r} is used by {kinds[compiled]} processes and this one is {kinds[not compiled]}: "
            f"they lock in different ways. Install shmcache alike everywhere (is SHMCACHE_PURE set?), use another "
            f"name, or, if nobody uses it any more, `shmcache unlink {name}`"
        )
    if header[layout.H_FLAGS] & layout.FLAG_EPHEMERAL:
        if wish.create and not lock_file.is_in_use():
            raise Unfinished  # its last process was killed, and so was its reaper
        use(name, lock_file, wish.timeout)
    return geometry


def use(name: str, lock_file: LockFile, timeout: float) -> None:
    """Say that an ephemeral cache is in use, or raise LockTimeout."""
    deadline = time.monotonic() + timeout
    while not lock_file.use():
        if time.monotonic() > deadline:
            raise LockTimeout(
                f"the reaper of the ephemeral cache {name!r} has kept everybody out for {timeout} s: look for a "
                f"stopped process (SIGSTOP) with `shmcache doctor {name}`"
            )
        time.sleep(0.0005)


def _no_cache(name: str) -> CacheNotFound:
    return CacheNotFound(f"there is no cache named {name!r}: `shmcache ls` lists those of this user")


def _read_header(segment: Descriptor, size: int, name: str) -> memoryview:
    header_bytes = layout.HEADER_WORDS * 8
    if size == 0:
        raise Unfinished
    if size < header_bytes:
        raise IncompatibleSegment(
            f"the shared memory {file_name(name)!r} has {size} bytes and is not a cache: remove it with "
            f"`shmcache unlink {name}`, or use another name"
        )
    header = memoryview(os.pread(segment.fileno(), header_bytes, 0)).cast("Q")
    magic = header[layout.H_MAGIC]
    if magic == 0 and (header[layout.H_VERSION] == layout.LAYOUT_VERSION or not any(header)):
        raise Unfinished  # `create_segment` writes the version first, `complete` the magic word last
    if magic == int.from_bytes(layout.MAGIC.to_bytes(8, "little"), "big"):
        raise IncompatibleSegment(f"cache {name!r} was created with the other byte order")
    if magic != layout.MAGIC:
        raise IncompatibleSegment(
            f"the shared memory {file_name(name)!r} is not a cache (it begins with {magic:#018x}): remove it with "
            f"`shmcache unlink {name}`, or use another name"
        )
    if header[layout.H_VERSION] != layout.LAYOUT_VERSION:
        raise IncompatibleSegment(
            f"cache {name!r} has layout version {header[layout.H_VERSION]}, this is a build for version "
            f"{layout.LAYOUT_VERSION}: stop the processes of the other one, then `shmcache unlink {name}`"
        )
    return header


def explained(error: Exception, name: str) -> ShmcacheError:
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


def _refuse_strangers(path: str) -> None:
    """Raise IncompatibleSegment if what has this name is not a file of this user, without opening it.

    Opening somebody else's file may take as long as they like: who has a lease on it is asked first, for 45 s.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_owner(os.lstat(path), path)


def _check_owner(status: os.stat_result, path: str) -> None:
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
def replace_used(lock_file: LockFile, name: str) -> bool:
    """With the setup lock: whether this lock file had a segment, and so has lost its name to a fresh one.

    Whoever has that segment may be locking bytes of this lock file.
    """
    if os.fstat(lock_file.fd).st_size == 0:
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lock_path(name))
    return True


def create_segment(wish: Wish, lock_file: LockFile) -> tuple[Descriptor, Geometry]:
    """With the setup lock: make a segment and fill in its header, except for the magic word. `complete` ends it."""
    os.ftruncate(lock_file.fd, 1)
    geometry = wish.geometry()
    segment = descriptors.open_shared_memory("/" + file_name(wish.name), posix_ipc.O_CREX)
    try:
        _reserve(segment.fileno(), geometry.file_bytes, wish)
        _write_header(segment, geometry, wish, lock_file)
    except BaseException:
        segment.close_own()
        raise
    return segment, geometry


def _write_header(segment: Descriptor, geometry: Geometry, wish: Wish, lock_file: LockFile) -> None:
    epoch = process_epoch()
    header = memoryview(mmap.mmap(segment.fileno(), layout.HEADER_WORDS * 8)).cast("Q")
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
        (layout.H_SECRET, random_word()),
        (layout.H_SECRET + 1, random_word()),
        (layout.H_CREATED, time.time_ns()),
        (layout.H_CREATOR, os.getpid()),
        (layout.H_DEFAULT_TTL, wish.default_ttl_ns or 0),
        (layout.H_LOCK_FILE, os.fstat(lock_file.fd).st_ino),
    ):
        if process_epoch() != epoch:
            raise forked_within()  # by a signal handler: the cache is the parent's, and perhaps in use by now
        store(header, word, value)


def complete(words: memoryview) -> None:
    """Say that the segment is complete."""
    store(words, layout.H_MAGIC, layout.MAGIC)


def random_word() -> int:
    """A word that nobody can guess."""
    return int.from_bytes(os.urandom(8), sys.byteorder)


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
    from shmcache.memory import shortage  # only who creates

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


def _round_size(size: int) -> str:
    """A size of /dev/shm that is no smaller, as Docker and mount take it: a power of two in MiB, or whole GiB."""
    if size > 2**29:
        return f"{-(-size // 2**30)}g"
    return f"{max(2**20, 1 << (size - 1).bit_length()) >> 20}m"


# --- removing -------------------------------------------------------------------------------------------------------
def unlink(name: str, timeout: float = 5.0) -> bool:
    """Remove the files of a cache; whether there were any. Processes that have it attached move to a new one."""
    check_name(name)
    with mutex_of(name):
        while any(map(os.path.lexists, file_paths(name, layout.MAX_SHARDS))):
            had_lock_file = os.path.lexists(lock_path(name))
            # Made if need be: a creator that is just beginning would not wait for less.
            with open_lock_file(name, create=True) as lock_file:
                removed = under_setup_lock(lock_file.fd, timeout, partial(_remove_if_named, name, lock_file))
            if removed is not None:
                return "segment" in removed or (had_lock_file and "lock file" in removed)
        return False


def _remove_if_named(name: str, lock_file: LockFile) -> set[str] | None:
    return remove_files(name) if is_named(lock_file, name) else None


def remove_files(name: str) -> set[str]:
    """With the setup lock: remove all files of a cache, as far as this user may; what was removed."""
    removed = set()
    with contextlib.suppress(posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        remove_segment(name)
        removed.add("segment")
    for number in range(layout.MAX_SHARDS):
        sleeper(name, number).unlink()
    with contextlib.suppress(FileNotFoundError, PermissionError):
        os.unlink(lock_path(name))
        removed.add("lock file")
    return removed


def remove_segment(name: str) -> None:
    """With the setup lock: remove the segment, which must be there."""
    posix_ipc.unlink_shared_memory("/" + file_name(name))


def remove_lock_file_of_nothing(name: str, lock_file: LockFile) -> None:
    """With the setup lock: after a creation that did not come to its segment. Nobody has done anything with it."""
    if not os.fstat(lock_file.fd).st_size and not os.path.lexists(segment_path(name)):
        with contextlib.suppress(OSError):
            os.unlink(lock_path(name))


def remove_if_unused(name: str, identity: tuple[int, int] | None) -> None:
    """Remove an ephemeral cache that no process has, neither attached nor forked from one that was."""
    with open_lock_file(name, create=False) as lock_file:
        if lock_file.identity == identity:
            under_setup_lock(
                lock_file.fd,
                1.0,
                lambda: is_named(lock_file, name) and not lock_file.is_in_use() and remove_files(name),
            )


def is_left_over(name: str, timeout: float) -> bool:
    """Whether nobody has an ephemeral cache any more, nor a reaper that will remove it. Attaching would remove it.

    Raises LockTimeout when attaching would have to wait for longer than `timeout`, CacheNotFound if there is none.
    """
    check_name(name)
    with mutex_of(name):
        if descriptors.is_open(lock_path(name)):
            return False  # it is in use here
        with open_lock_file(name, create=False) as lock_file:
            return under_setup_lock(lock_file.fd, timeout, partial(_has_nobody, name, lock_file, timeout))


def _has_nobody(name: str, lock_file: LockFile, timeout: float) -> bool:
    if not is_byte_locked(lock_file.fd, REAPER_BYTE):
        return not lock_file.is_in_use()
    use(name, lock_file, timeout)
    return False
