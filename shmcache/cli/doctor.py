"""What can be wrong with the caches of this machine: which facts are findings, how bad each is and what to do about it
is this file's.

It changes nothing and waits for nobody longer than `PATIENCE`. It looks at files from outside first, because attaching
to an ephemeral cache that everybody has left would remove it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shmcache import segment
from shmcache.cache import Cache
from shmcache.cli.text import show_age, show_size
from shmcache.engine import layout
from shmcache.engine.bytelock import REAPER_BYTE, SETUP_BYTE, holders
from shmcache.engine.primitives import load
from shmcache.engine.store import is_compiled
from shmcache.errors import CacheNotFound, LockTimeout, ShmcacheError
from shmcache.memory import PROC, shortage
from shmcache.stats import Stats

__all__ = ["Finding", "examine"]

PATIENCE = 1.0  # seconds to wait for any one lock
WATCH = 0.1  # seconds for which a lock, or a file without its partner, is watched before it is a finding
MIN_FREE = 2**20  # bytes of /dev/shm; with less, hardly any cache can be created
FREE_SHARE = 0.1  # of /dev/shm
DEFAULT_SIZE = 64 * 2**20  # of a cache
CONTAINER_SIZE = 64 * 2**20  # of /dev/shm in a container that was not given more
MIN_FILES = 64  # an attached cache has three files open, an interpreter and its application many more
FEW_FILES = 256
NEARLY_FULL = 0.9  # of the process table, and of entries or bytes
HIGH_EVICTIONS = 0.1  # of what is stored
FIRST_ORDINARY_UID = 1000  # logind spares the users below
LOGIND = ("/usr/lib/systemd", "/run/systemd", "/etc/systemd")

_SEMAPHORE = re.compile(r"(.+)~\d+\Z")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `about` what, what was `found`, and what to `do` about it, if anything."""

    level: Literal["ok", "info", "problem"]
    about: str
    found: str
    do: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """The same as plain data, for JSON."""
        return asdict(self)


def examine(name: str | None = None) -> Iterator[Finding]:
    """Look at the machine and at every cache of this user, or at the one of that `name` only.

    Raises CacheNotFound if nothing is left of the cache `name`, not even a stale file.
    """
    listed: set[str] = set()
    unlisted: Finding | None = None
    try:
        listed = _files()
    except OSError as error:
        unlisted = Finding(
            "problem",
            segment.DIRECTORY,
            f"it cannot be listed ({error.strerror})",
            "let this user read, write and search it (it is a tmpfs with mode 1777 on most machines)",
        )
    known = unlisted is None and not _is_missing()
    if name is not None and known and name not in {_cache_of(file) for file in listed}:
        raise CacheNotFound(f"there is no cache named {name!r}: `shmcache ls` lists those of this user")
    yield from engine()
    yield from shared_memory()
    if unlisted is not None:
        yield unlisted
    yield from limits()
    yield from memory_limit()
    yield from logind(LOGIND)
    yield from stale_files(name)
    if not os.access(segment.DIRECTORY, os.X_OK):
        return  # no file can be opened, which says nothing about a cache
    for each in segment.names() if name is None else [name]:
        if _cache_of(segment.file_name(each)):
            yield from cache(each)


# --- the machine ----------------------------------------------------------------------------------------------------
def engine() -> Iterator[Finding]:
    """Whether the compiled engine runs."""
    if is_compiled():
        yield Finding("ok", "engine", "compiled")
    elif os.environ.get("SHMCACHE_PURE", "") not in ("", "0"):
        yield Finding(
            "info",
            "engine",
            "uncompiled, many times slower, because SHMCACHE_PURE is set",
            "unset SHMCACHE_PURE, in all processes that share a cache, unless this is what you want",
        )
    else:
        yield Finding(
            "problem",
            "engine",
            "uncompiled, many times slower",
            "install a C compiler and Python's headers (Debian: gcc python3-dev) and reinstall shmcache, or set "
            "SHMCACHE_PURE=1 if this is what you want",
        )


def shared_memory() -> Iterator[Finding]:
    """Whether /dev/shm is there, how large it is, and what is left of it."""
    about = segment.DIRECTORY
    if _is_missing():
        yield Finding(
            "problem",
            "/dev/shm",
            "it is missing, so no cache can be created",
            "mount it: `mkdir /dev/shm && mount -t tmpfs -o mode=1777 tmpfs /dev/shm`",
        )
        return
    try:
        room = os.statvfs(about)
    except OSError as error:
        yield Finding("problem", about, f"its size is not known ({error.strerror})", "mount a tmpfs there")
        return
    if not os.access(about, os.W_OK | os.X_OK):
        yield Finding("problem", about, "this user may not write there", f"`chmod 1777 {about}`, as its owner")
    mode = os.stat(about).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield Finding(
            "info",
            about,
            "every user may remove and replace the files of others there, for its sticky bit is not set",
            f"`chmod 1777 {about}`, unless all its users trust each other (a Kubernetes emptyDir is made like that)",
        )
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    found = f"{show_size(free)} free of {show_size(total)}"
    more = (
        "unlink caches that nobody needs, or make it larger: Docker `--shm-size`, Kubernetes an emptyDir volume with "
        f"`medium: Memory`, otherwise `mount -o remount,size=... {about}`"
    )
    if total and free < MIN_FREE:
        yield Finding("problem", about, f"{found}: new caches do not fit", more)
    elif free < FREE_SHARE * total:
        yield Finding("info", about, f"{found}: little is left for new caches", more)
    else:
        yield Finding("ok", about, found)
    if total == CONTAINER_SIZE:
        yield Finding(
            "info",
            about,
            "its size is what a container has that was not given more",
            "for larger caches: Docker `--shm-size=1g`; Kubernetes an emptyDir volume with `medium: Memory` mounted "
            "at /dev/shm",
        )


def _is_missing() -> bool:
    return sys.platform == "linux" and not Path("/dev/shm").is_dir()


def limits() -> Iterator[Finding]:
    """Limits of this process, which others started in the same way have as well."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files >= FEW_FILES:
        yield Finding("ok", "open files", "no limit" if files == resource.RLIM_INFINITY else f"{files:,} allowed")
    else:
        yield Finding(
            "problem" if files < MIN_FILES else "info",
            "open files",
            f"only {files:,} allowed here (RLIMIT_NOFILE), and each cache takes three of a process",
            "raise it: `ulimit -n 1024`, systemd `LimitNOFILE=`",
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield Finding(
            "info",
            "address space",
            f"limited to {show_size(space)} here (RLIMIT_AS), and a process maps all of each cache it attaches to",
            "lift it where caches do not fit: `ulimit -v unlimited`, systemd `LimitAS=infinity`",
        )


def memory_limit(proc: Path = PROC) -> Iterator[Finding]:
    """Whether the machine, or a control group, has memory left for a cache of the default size."""
    short = shortage(DEFAULT_SIZE, proc)
    if short is None:
        yield Finding("ok", "memory", f"there is enough for a cache of {show_size(DEFAULT_SIZE)}")
    else:
        yield Finding(
            "info",
            "memory",
            f"{show_size(max(0, short.left))} left of the {show_size(short.limit)} of {short.whose}: no larger cache "
            "can be created",
            "raise the limit: Docker `--memory`, Kubernetes `resources.limits.memory`, systemd `MemoryMax=`",
        )


def logind(directories: Iterable[str]) -> Iterator[Finding]:
    """Whether a configuration file of logind says that what a user has in /dev/shm goes with the last session."""
    if os.geteuid() < FIRST_ORDINARY_UID:
        return
    said, where = "", Path()
    for directory in directories:
        for path in (Path(directory, "logind.conf"), *sorted(Path(directory, "logind.conf.d").glob("*.conf"))):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                for match in re.finditer(r"^\s*RemoveIPC\s*=\s*(\w+)", path.read_text(), re.MULTILINE):
                    said, where = match[1], path
    if said.lower() in ("yes", "true", "on", "1"):
        yield Finding(
            "info",
            "logind",
            f"RemoveIPC={said} in {where}: caches of this user go when the user's last session ends",
            "run services as a system user, set RemoveIPC=no, or `loginctl enable-linger USER`",
        )


# --- files ----------------------------------------------------------------------------------------------------------
def stale_files(name: str | None = None) -> Iterator[Finding]:
    """Files of caches that have lost their partners, of all caches or of that `name`.

    A cache that is being created or removed looks like that for a moment, so what is not the same twice is none.
    """
    stale = _stale(name)
    if stale:
        time.sleep(WATCH)
        stale &= _stale(name)
    for each, kind, _ in sorted(stale):
        if kind == "segment":
            found = "its lock file is gone, so nobody can attach to it"
            do = f"`shmcache unlink {each}`; `Cache({each!r})` makes it anew as well"
        elif kind == "lock":
            found = "there is a lock file, but no shared memory"
            do = f"`shmcache unlink {each}`; `Cache({each!r})` makes it anew as well"
        else:
            found = "semaphores are left of it, and nothing else"
            do = f"`rm {segment.DIRECTORY}/sem.{segment.file_name(each)}~*`"
        yield Finding("problem", each, found, do)


def _stale(name: str | None) -> set[tuple[str, str, int]]:
    """What is left of each incomplete cache: its name, what kind of file it is, and the inode of that."""
    try:
        files = _files()
    except OSError:
        return set()
    found: set[tuple[str, str, int]] = set()
    for file in files:
        each = _cache_of(file)
        if name not in (None, each):
            continue
        own = segment.file_name(each)
        partners = {own, f"{own}~lock"}
        kind = "semaphore" if file.startswith("sem.") else "segment" if file == own else "lock"
        if partners <= files or (kind == "semaphore" and partners & files):
            continue
        inode = 0  # of semaphores, one finding is enough
        if kind != "semaphore":
            try:
                inode = (Path(segment.DIRECTORY) / file).lstat().st_ino
            except OSError:
                continue
        found.add((each, kind, inode))
    return found


def _files() -> set[str]:
    """The names of the files of this user's caches."""
    return {file for file in os.listdir(segment.DIRECTORY) if _cache_of(file)}


def _cache_of(file: str) -> str:
    """The name of the cache that a file is of, or ""."""
    prefix = segment.file_name("")
    name = ""
    if file.startswith(f"sem.{prefix}"):
        match = _SEMAPHORE.match(file, len(f"sem.{prefix}"))
        name = match[1] if match else ""
    elif file.startswith(prefix):
        name = file[len(prefix) :].removesuffix("~lock")
    try:
        segment.check_name(name)
    except ValueError:
        return ""
    return name


# --- one cache ------------------------------------------------------------------------------------------------------
def cache(name: str) -> Iterator[Finding]:
    """All about one cache."""
    yield from setup(name)
    try:
        header = _header(name)
        if header and header[layout.H_FLAGS] & layout.FLAG_EPHEMERAL and segment.is_left_over(name, PATIENCE):
            yield Finding(
                "problem",
                name,
                "it is ephemeral, its last process is gone, and so is what should have removed it",
                f"`shmcache unlink {name}`",
            )
            return
        used = _last_attached(header)
        with Cache.attach(name, lock_timeout=PATIENCE) as attached:
            stats = attached.stats()
            yield from idle(stats, used)
            yield from process_table(attached, stats)
            yield from room(stats)
            yield from locks(attached)
            yield from contents(attached)
    except CacheNotFound:
        pass  # `stale_files` says so if that lasts
    except ShmcacheError as error:
        yield _of_error(name, error)
    except OSError as error:
        hint = "raise the limit of open files: `ulimit -n 1024`" if error.errno == errno.EMFILE else None
        yield Finding(
            "problem", name, f"it cannot be opened: {error}", hint or "let this user read and write its files"
        )


def locks(attached: Cache) -> Iterator[Finding]:
    """Who has held the lock of a shard all the while, without changing anything: stopped, it is a problem."""
    attachment = attached._attachment
    words, geometry = attachment.words, attachment.geometry

    def held() -> set[tuple[int, int, int]]:
        headers = [geometry.region(shard).header for shard in range(geometry.shards)]
        seen = [
            (shard, load(words, at + layout.S_LOCK), load(words, at + layout.S_STAMP))
            for shard, at in enumerate(headers)
        ]
        return {each for each in seen if each[1]}

    began = time.monotonic()
    lasting = held()
    while lasting and time.monotonic() - began < WATCH:
        time.sleep(WATCH / 10)
        lasting &= held()
    if not lasting:
        yield Finding("ok", attached.name, "no lock is held for long")
        return
    watched = show_age(time.monotonic() - began)
    seen_from_here = holders(segment.lock_path(attached.name)) or {}
    for shard, owner, _ in sorted(lasting):
        if not attachment.registry.is_alive(owner):
            found = f"the process that held the lock of shard {shard} has ended: whoever wants it next takes it over"
            yield Finding("info", attached.name, found)
            continue
        line = owner >> 48
        at = attachment.registry.line(line)
        pid = seen_from_here.get(line)
        since = show_age(max(0.0, time.time() - load(words, at + layout.P_ATTACHED) / 1e9))
        who = f"process {pid}" if pid else f"process {load(words, at + layout.P_PID)} of another pid namespace"
        found = f"the lock of shard {shard} has been held for at least {watched} by {who}, attached {since} ago"
        if pid and _is_stopped(pid):
            do = f"`kill -CONT {pid}` lets it go on; if it is killed, others take the lock over and lose nothing"
            yield Finding("problem", attached.name, f"{found}, which is stopped: writers wait for it in vain", do)
        else:
            yield Finding("info", attached.name, found, "look at what it does, if this is so again and again")


def process_table(attached: Cache, stats: Stats) -> Iterator[Finding]:
    """How many places of the process table are taken, this process not counted."""
    places: int = attached._attachment.geometry.processes
    others = _others(stats)
    found = f"{others:,} of {places:,} places for processes are taken"
    if others >= NEARLY_FULL * places:
        yield Finding(
            "problem",
            stats.name,
            found,
            "close the cache in processes that no longer need it, or unlink it and create it larger (16 MB or more "
            f"have {layout.MAX_PROCESSES:,} places)",
        )
    else:
        yield Finding("ok", stats.name, found)


def room(stats: Stats) -> Iterator[Finding]:
    """Whether it is nearly full and evicts much of what is stored, which is what a cache may do."""
    # An entry for each slot, or next to no free block.
    for what, full in (
        ("max_entries", stats.entries >= NEARLY_FULL * stats.max_entries),
        ("max_bytes", stats.bytes_free <= (1 - NEARLY_FULL) * stats.max_bytes),
    ):
        if full and stats.evictions > HIGH_EVICTIONS * stats.sets:
            yield Finding(
                "info",
                stats.name,
                f"{what} is nearly used up, and {stats.evictions:,} entries were evicted for {stats.sets:,} stored",
                f"if the hit ratio is lower than you want, unlink it and create it with a larger {what}",
            )


def idle(stats: Stats, used: float) -> Iterator[Finding]:
    """Whether nobody has it attached. `used` is when somebody last attached, as far as the process table tells."""
    if not _others(stats):
        yield Finding(
            "info",
            stats.name,
            f"no process has it attached; the last one, or a command, came {show_age(max(0.0, time.time() - used))} "
            f"ago, and it takes {show_size(stats.max_bytes)}",
            f"if nobody needs it any more, `shmcache unlink {stats.name}`",
        )


def contents(attached: Cache) -> Iterator[Finding]:
    """Whether its contents contradict themselves."""
    try:
        problems = attached.check()
    except LockTimeout:
        yield Finding(
            "problem",
            attached.name,
            f"its contents could not be compared: a live process has held the lock of a shard for {PATIENCE:g} s",
            f"see to that process, then `shmcache check {attached.name}`",
        )
        return
    if problems:
        more = f" (the first of {len(problems)} contradictions)" if len(problems) > 1 else ""
        yield Finding(
            "problem",
            attached.name,
            f"its contents contradict themselves: {problems[0]}{more}",
            f"`shmcache repair {attached.name}` keeps what can be proved; then look for what writes to memory that is "
            f"not its own",
        )
    else:
        yield Finding("ok", attached.name, "no contradictions")


def setup(name: str) -> Iterator[Finding]:
    """Whether a process that attaches, or that should remove the cache, is stopped."""
    for byte, pid in sorted((holders(segment.lock_path(name)) or {}).items()):
        if byte in (SETUP_BYTE, REAPER_BYTE) and _is_stopped(pid):
            what = "should remove it" if byte == REAPER_BYTE else "creates, attaches to or unlinks it"
            yield Finding("problem", name, f"process {pid}, which {what}, is stopped", f"`kill -CONT {pid}`, or end it")


def _of_error(name: str, error: ShmcacheError) -> Finding:
    """Messages say what happened, and behind a colon what to do."""
    found, _, do = str(error).partition(": ")
    return Finding("problem", name, found, do or f"`shmcache unlink {name}`, if nobody needs it any more")


def _others(stats: Stats) -> int:
    """How many processes have it attached besides one of this pid, which is ours."""
    return max(0, stats.processes - 1)


def _header(name: str) -> list[int]:
    """The header and the process table of the segment, as far as they are there, read from outside; else []."""
    try:
        fd = os.open(Path(segment.DIRECTORY) / segment.file_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        size = 8 * (layout.HEADER_WORDS + layout.MAX_PROCESSES * layout.PROCESS_WORDS)
        data = os.pread(fd, size, 0)
    except OSError:
        return []
    finally:
        os.close(fd)
    words = list(memoryview(data[: len(data) // 8 * 8]).cast("Q"))
    sound = len(words) >= layout.HEADER_WORDS and words[layout.H_MAGIC] == layout.MAGIC
    return words if sound and words[layout.H_VERSION] == layout.LAYOUT_VERSION else []


def _last_attached(header: list[int]) -> float:
    """When somebody last attached, seconds since the epoch; creating is attaching."""
    if not header:
        return time.time()
    end = layout.HEADER_WORDS + min(header[layout.H_PROCESSES], layout.MAX_PROCESSES) * layout.PROCESS_WORDS
    times = header[layout.HEADER_WORDS + layout.P_ATTACHED : end : layout.PROCESS_WORDS]
    return max([header[layout.H_CREATED], *times]) / 1e9


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or by a debugger; False where that is not known."""
    try:
        # "4711 (a name (of any kind)) T 1 ..."
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False
