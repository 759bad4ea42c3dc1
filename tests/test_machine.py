"""The machine fails: memory, files, limits and the clock are not what a cache expects. Each a clear error, or no harm.

Where a small or broken /dev/shm is needed, a child mounts one in a mount namespace of its own.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmcache import Cache, CacheNotFound, SegmentTooLarge, SharedMemoryUnavailable, memory, segment
from shmcache.engine import layout
from shmcache.engine.layout import Geometry
from tests.processes import (
    Child,
    Family,
    Gate,
    cannot_mount,
    files,
    mount_shared_memory,
    no_gc,
    run_python,
    until,
)

importlib.import_module("shmcache.stats")  # otherwise with its first use, for which there may be no file left

SHM = Path("/dev/shm")
PAGE = os.sysconf("SC_PAGE_SIZE")

# --- a small /dev/shm -----------------------------------------------------------------------------------------------
missing_mounts = functools.cache(cannot_mount)


def in_own_shared_memory(work: Callable[..., object], options: str, *arguments: object, flags: int = 0) -> None:
    """Do the work in a child that has a /dev/shm of its own. SIGBUS would be a status of -7."""

    def child() -> None:
        mount_shared_memory(options, flags)
        work(*arguments)

    if (why := missing_mounts()) is not None:
        pytest.skip(why)
    with no_gc(), Family() as family:
        assert family.fork(child).wait() == 0


def listen() -> list[str]:
    """What the package logs from now on, in a child."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shmcache").addHandler(handler)
    return said


def free_bytes() -> int:
    room = os.statvfs(SHM)
    return room.f_bavail * room.f_frsize


def fill(leave: int = 0) -> Path:
    """Somebody else takes all that is left of /dev/shm, but for some bytes."""
    path = SHM / "somebody else's"
    with path.open("ab") as file:
        while (left := free_bytes() - leave) > 0:
            file.write(bytes(min(left, 1 << 20)))
            file.flush()
    return path


def use_it_all(cache: Cache) -> None:
    """Touch every page of it, in every way."""
    value = os.urandom(cache._attachment.geometry.max_entry_bytes // 3)
    for number in range(8):
        cache.set(number, value)
        assert cache.get(number) == value
    with cache.batch() as batch:
        batch.set("a", 1)
        batch.incr("a")
    cache.set_many(dict.fromkeys(range(200), 1))
    assert cache.check() == []
    assert cache.repair() == []
    cache.clear()
    assert cache.stats().entries == 0
    cache.set("key", "value")


@pytest.mark.parametrize("megabytes", [1, 64])
def test_shared_memory_that_somebody_else_has_filled_before(megabytes: int) -> None:
    total = megabytes * 2**20

    def work() -> None:
        filler = fill(leave=total // 4)
        free = free_bytes()
        for size in (total // 2, total, 4 * total):
            with pytest.raises(
                SegmentTooLarge, match=rf"asks for {size:,} bytes, but /dev/shm has {free:,} free of {total:,}"
            ):
                Cache("cache", max_bytes=size)
            assert os.listdir(SHM) == [filler.name]
        with Cache("small", max_bytes=total // 4, max_entries=1000) as cache:
            use_it_all(cache)
            cache.unlink()
        fill()
        with pytest.raises(SegmentTooLarge, match="has 0 free") as caught:
            Cache("cache", max_bytes="300KB")
        for advice in ("Docker `--shm-size=%dm`", "`sizeLimit: %dMi` mounted", "`mount -o remount,size=%dm /dev/shm`"):
            assert advice % (2 * megabytes) in str(caught.value)
        with pytest.raises(CacheNotFound):
            Cache.attach("cache")
        assert os.listdir(SHM) == [filler.name]

    in_own_shared_memory(work, f"size={megabytes}m")


@pytest.mark.parametrize("megabytes", [1, 64])
def test_shared_memory_that_somebody_else_fills_after_creation(megabytes: int) -> None:
    total = megabytes * 2**20

    def other() -> None:
        with Cache("cache") as cache:
            assert cache.get("key") == "value"
            use_it_all(cache)

    def work() -> None:
        with Cache("cache", max_bytes=total // 2, max_entries=1000) as cache, Family() as family:
            fill()
            use_it_all(cache)
            assert [family.fork(other).wait() for _ in range(2)] == [0, 0]
            assert cache.stats().processes == 1
            with pytest.raises(SegmentTooLarge):
                Cache("another", max_bytes="128KB")

    in_own_shared_memory(work, f"size={megabytes}m")


@pytest.mark.parametrize(("megabytes", "rounds"), [(1, 20), (64, 3)])
def test_shared_memory_that_somebody_else_fills_during_creation(megabytes: int, rounds: int) -> None:
    """Whoever wins the race: a cache whose every page can be used, or an error that leaves nothing behind."""
    total = megabytes * 2**20
    path = SHM / "somebody else's"

    def race() -> None:
        rng, buffer = random.Random(megabytes), bytes(total // 16)
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        while True:
            try:
                os.write(fd, buffer[: rng.randrange(1, len(buffer))])
            except OSError:
                os.ftruncate(fd, 0)
                os.lseek(fd, 0, os.SEEK_SET)

    def work() -> None:
        made = refused = tries = 0
        with Family() as family:
            filler = family.fork(race)
            until(path.exists)
            while tries < rounds or not made or not refused:
                tries += 1
                try:
                    cache = Cache("cache", max_bytes=total * 7 // 16, max_entries=1000)
                except SegmentTooLarge:
                    refused += 1
                    assert os.listdir(SHM) == [path.name]
                else:
                    made += 1
                    use_it_all(cache)
                    cache.unlink()
                    del cache
            filler.poll()

    in_own_shared_memory(work, f"size={megabytes}m")


def test_the_default_cache_takes_all_of_the_shared_memory_of_a_container() -> None:
    """It fits in, and nothing else does, as docs/deployment.md says."""

    def work() -> None:
        said = listen()
        for ephemeral in (False, True):
            with Cache("cache", ephemeral=ephemeral) as cache:
                assert cache.stats().max_bytes == 64 * 2**20
                assert len(files("cache")) == 2 + cache._attachment.geometry.shards
                use_it_all(cache)
                with pytest.raises(SegmentTooLarge, match=r"--shm-size=128m"):
                    Cache("another", max_bytes="1MB")
                with pytest.raises(OSError, match="No space left"):
                    multiprocessing.get_context("fork").Pool(2)
                cache.unlink()
        with Cache("cache", max_bytes="48MB") as cache:
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(abs, [-1]) == [1]
            cache.unlink()
        assert said == []
        assert os.listdir(SHM) == []

    in_own_shared_memory(work, "size=64m")


def test_no_room_for_the_semaphores_only() -> None:
    """The last bytes go between the memory of the cache and its semaphores: it works, and says what it lacks."""

    def work() -> None:
        said = listen()
        size = Geometry.plan(2**19, None, None, "lru").file_bytes
        filler = fill(leave=-(-size // PAGE) * PAGE)
        with Cache("cache", max_bytes=2**19) as cache:
            assert free_bytes() < PAGE
            assert sorted(os.listdir(SHM)) == [
                segment.file_name("cache"),
                Path(segment.lock_path("cache")).name,
                filler.name,
            ]
            use_it_all(cache)
            [sleeper] = cache._attachment.sleepers
            sleeper.wake()
            assert sleeper.sleep() is False
        assert len(said) == 1
        assert "no semaphores could be created for cache 'cache'" in said[0]

    in_own_shared_memory(work, "size=1m")


def test_the_files_that_a_file_system_may_have_are_used_up() -> None:
    """One inode more each time, until there are enough. (The root of the file system is one.)"""

    def work() -> None:
        refused = 0
        for inodes in range(2, 6):
            mount_shared_memory(f"size=4m,nr_inodes={inodes}")
            cache = refusal = None
            try:
                cache = Cache("cache", max_bytes=2**19)
            except SegmentTooLarge as error:
                refusal = error
            if cache is None:
                refused += 1
                assert "no more files fit into /dev/shm" in str(refusal)
            else:
                use_it_all(cache)
                cache.unlink()
            assert os.listdir(SHM) == []
        assert refused == 1, "a lock file is of no use alone; semaphores one can do without"

    in_own_shared_memory(work, "size=1m")


def test_processes_that_use_it_meet_again_where_there_is_room_for_one_cache_only() -> None:
    """An unlinked cache keeps its memory until the last process has let go of it."""

    def use(number: int) -> None:
        said = listen()
        cache, twin = Cache("cache", max_bytes="700KB"), Cache("cache")
        inode = os.fstat(cache._attachment.segment_fd).st_ino
        moved = 0
        deadline = time.monotonic() + 20
        while moved < 3 or len(cache.get_many(range(3))) < 3:
            assert time.monotonic() < deadline
            cache.set(number, number)
            twin.get(number)
            moved = max(moved, cache.get("all moved", 0))
            if os.fstat(cache._attachment.segment_fd).st_ino != inode:
                inode = os.fstat(cache._attachment.segment_fd).st_ino
                cache.incr("all moved", initial=0)
        assert len(said) == 1, said
        assert "were unlinked or closed while in use: attaching anew" in said[0]
        assert cache.check() == []

    def work() -> None:
        with Family() as family:
            with Cache("cache", max_bytes="700KB") as cache:
                children = [family.fork(use, number) for number in range(3)]
                until(lambda: len(cache.get_many(range(3))) == 3)
            (SHM / segment.file_name("cache")).unlink()
            assert [child.wait() for child in children] == [0] * 3

    in_own_shared_memory(work, "size=1m")


def test_an_idle_process_that_keeps_the_memory_of_an_unlinked_cache() -> None:
    """There is room again when it is gone. Until then each operation says so, and none waits long but the first."""

    def keep(gate: Gate) -> None:
        cache = Cache("cache", max_bytes="700KB", clock=lambda: 1)  # it never looks whether the files are there
        cache.set("key", "value")
        gate.wait()

    def use(told: Gate) -> None:
        cache = Cache("cache", max_bytes="700KB")
        until(lambda: cache.get("key") == "value")
        (SHM / segment.file_name("cache")).unlink()
        with pytest.raises(SegmentTooLarge, match="asks for 716,800 bytes, but /dev/shm has"):
            while True:
                cache.set("key", "value")
        began = time.monotonic()
        for operation in (lambda: cache.get("key"), lambda: cache.set("key", 1), cache.stats, cache.check):
            with pytest.raises(SegmentTooLarge):
                operation()
        assert time.monotonic() - began < 0.5
        told.open()
        until(lambda: works(cache))
        assert cache.get("key") == "again"
        cache.close()

    def works(cache: Cache) -> bool:
        try:
            cache.set("key", "again")
        except SegmentTooLarge:
            return False
        return True

    def work() -> None:
        gate = Gate()
        with Family() as family:
            idle = family.fork(keep, gate)
            child = family.fork(use, gate)
            gate.close()
            assert child.wait() == 0
            assert idle.wait() == 0

    in_own_shared_memory(work, "size=1m")


# --- a /dev/shm that is none ----------------------------------------------------------------------------------------
MS_RDONLY, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 4, 8, 32


def test_shared_memory_mounted_without_the_right_to_execute() -> None:
    def work() -> None:
        with Cache("cache", max_bytes=2**19) as cache:
            use_it_all(cache)

    in_own_shared_memory(work, "size=1m", flags=MS_NODEV | MS_NOEXEC)


def test_shared_memory_that_is_read_only() -> None:
    def work() -> None:
        for ephemeral in (False, True):
            with pytest.raises(
                SharedMemoryUnavailable, match=r"\(Read-only file system\): expected /dev/shm"
            ) as caught:
                Cache("cache", ephemeral=ephemeral)
            assert caught.value.errno == errno.EROFS
        with pytest.raises(CacheNotFound):
            Cache.attach("cache")

    in_own_shared_memory(work, "size=1m", flags=MS_RDONLY)


def test_shared_memory_that_becomes_read_only_in_use() -> None:
    """A file system cannot while a file of it can be written: whoever tries is told that it is busy."""

    def work() -> None:
        with Cache("cache", max_bytes=2**19) as cache:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mount(b"none", b"/dev/shm", None, MS_REMOUNT | MS_RDONLY, None) == -1
            assert ctypes.get_errno() == errno.EBUSY
            use_it_all(cache)

    in_own_shared_memory(work, "size=1m")


MISSING = """
import os, shmcache
assert not os.path.exists("/dev/shm")
for open_it in (shmcache.Cache, shmcache.Cache.attach):
    try:
        open_it("no-shared-memory")
    except (shmcache.SharedMemoryUnavailable, shmcache.CacheNotFound) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a /dev without shm")
def test_shared_memory_that_is_missing(tmp_path: Path) -> None:
    """Before the package is imported, and after."""

    def lose() -> None:
        libc = ctypes.CDLL(None)
        assert libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, b"mode=755") == 0
        for file, minor in (("null", 3), ("urandom", 9)):
            os.mknod(f"/dev/{file}", 0o020_666, os.makedev(1, minor))

    def work() -> None:
        lose()
        with pytest.raises(SharedMemoryUnavailable, match=r"No such file or directory\): expected /dev/shm, a tmpfs"):
            Cache("no-shared-memory")
        with pytest.raises(CacheNotFound):
            Cache.attach("no-shared-memory")
        os.environ["TMPDIR"] = str(tmp_path)
        said = run_python(MISSING).splitlines()
        assert said[0].startswith("SharedMemoryUnavailable"), said
        assert "expected /dev/shm, a tmpfs in which this user may create files. Mount it, `mount -t tmpfs" in said[0]
        assert said[1].startswith("CacheNotFound"), said
        assert list(tmp_path.iterdir()) == []

    in_own_shared_memory(work, "size=1m")


# --- limits of a process --------------------------------------------------------------------------------------------
def in_child(work: Callable[[], object]) -> None:
    with no_gc():
        assert Child(work).wait() == 0


def limit(what: int, soft: int) -> None:
    resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_no_more_open_files_at_creation(name: str) -> None:
    """One descriptor more each time, until there are enough; at each step nothing is left, open or in /dev/shm."""

    def work() -> None:
        os.closerange(3, 1024)
        unlimited = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        before, refused = open_files(), 0
        while True:
            limit(resource.RLIMIT_NOFILE, 3 + refused)
            cache = refusal = None
            try:
                cache = Cache(name, max_bytes=2**19)
            except SharedMemoryUnavailable as error:
                refusal = error
            if cache is not None:
                break
            limit(resource.RLIMIT_NOFILE, unlimited)
            assert refusal is not None
            assert refusal.errno == errno.EMFILE
            assert "(Too many open files): a cache takes three files. Close some, or raise" in str(refusal)
            assert open_files() == before
            assert files(name) == []
            refused += 1
            assert refused < 20
        assert refused >= 3
        use_it_all(cache)
        limit(resource.RLIMIT_NOFILE, unlimited)
        cache.close()
        assert open_files() == before

    in_child(work)


def test_no_more_open_files_in_use(name: str) -> None:
    """Operations need none, also when they have to wait. Moving to a new cache does with those of the old one."""

    def work() -> None:
        said = listen()
        os.closerange(3, 1024)
        unlimited = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        Cache(name, max_bytes=2**19).close()
        cache = Cache(name)
        limit(resource.RLIMIT_NOFILE, 6)
        [sleeper] = cache._attachment.sleepers
        assert sleeper.sleep() is False
        use_it_all(cache)
        path = Path(segment.DIRECTORY) / segment.file_name(name)
        path.unlink()
        until(lambda: cache.incr("count", initial=0) and path.exists())
        assert [text.partition(" cache '")[0] for text in said] == [
            "the files of",
            "no semaphores could be created for",
        ]

        limit(resource.RLIMIT_NOFILE, 5)
        path.unlink()
        for _ in range(2):
            with pytest.raises(SharedMemoryUnavailable):
                while True:
                    cache.set("key", "new value")
        limit(resource.RLIMIT_NOFILE, unlimited)
        cache.set("key", "new value")
        assert cache.get("key") == "new value"
        assert path.exists()
        assert len(said) == 3

    in_child(work)


def test_a_limit_of_address_space(name: str) -> None:
    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * PAGE + 16 * 2**20)
        with pytest.raises(
            SegmentTooLarge, match=r"Cannot allocate memory\): this process may map no more.*`ulimit -v unl"
        ):
            Cache(name, max_bytes="64MB")
        assert files(name) == []
        with Cache(name, max_bytes="1MB") as cache:
            use_it_all(cache)
            cache.unlink()

    in_child(work)


def test_a_limit_of_the_size_of_files(name: str) -> None:
    def work() -> None:
        limit(resource.RLIMIT_FSIZE, 2**20)
        with pytest.raises(
            SegmentTooLarge, match=r"may not make a file that large: raise the limit, `ulimit -f unlimited`"
        ):
            Cache(name, max_bytes="64MB")
        assert files(name) == []
        with Cache(name, max_bytes=2**19) as cache:
            use_it_all(cache)
            cache.unlink()
        limit(resource.RLIMIT_FSIZE, 0)
        with pytest.raises(SharedMemoryUnavailable, match=r"may write no file. Raise the limit, `ulimit -f unlimited`"):
            Cache(name, max_bytes="64MB")
        assert files(name) == []

    in_child(work)


def test_semaphores_that_were_removed(name: str) -> None:
    """Who attaches later has none to sleep on: said once, and nothing else comes of it."""

    def work() -> None:
        said = listen()
        other = Cache(name)
        word = other._attachment.geometry.region(0).header + layout.S_LOCK
        other._attachment.words[word] = other._attachment.member.owner + 1  # the generation of a process that is gone
        other.set("key", "other")
        [sleeper] = other._attachment.sleepers
        assert sleeper.sleep() is False
        sleeper.wake()
        assert len(said) == 1, said
        assert f"the semaphore {sleeper.name} is missing" in said[0]
        assert other.stats().recoveries == 1

    with Cache(name, max_bytes=2**19, shards=1) as cache:
        [sleeper] = cache._attachment.sleepers
        sleeper.unlink()
        cache.close()
        in_child(work)
    with Cache(name) as cache:
        assert cache.get("key") == "other"


# --- limits of memory -----------------------------------------------------------------------------------------------
@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of memory within the one of this process."""
    for folder in itertools.islice(memory._groups(Path("/proc")), 1):
        path = folder / f"test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if any((path / file).exists() for file in ("memory.max", "memory.limit_in_bytes")):
                yield path
                return
        finally:
            until(functools.partial(removed, path))
    pytest.skip("this user cannot make a control group with a memory limit")


def removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def test_a_memory_limit_of_a_control_group_is_an_error_rather_than_the_oom_killer(name: str, group: Path) -> None:
    def work() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        [file] = [group / file for file in ("memory.max", "memory.limit_in_bytes") if (group / file).exists()]
        file.write_text(str(64 * 2**20))
        with pytest.raises(
            SegmentTooLarge, match=rf"memory limit of {group}, 67,108,864 bytes, leaves [\d,]{{9,10}}\. .*Docker `--mem"
        ):
            Cache(name, max_bytes="64MB")
        assert files(name) == []
        with Cache(name, max_bytes="16MB") as cache:
            use_it_all(cache)
            cache.unlink()

    in_child(work)


MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\nSwapTotal: {0} kB\nSwapFree: {0} kB\n"
V2 = "30 20 0:28 {root} {mount} rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {root} {mount} rw shared:9 - cgroup cgroup rw,memory\n33 31 0:30 / /cpu rw - cgroup cgroup rw,cpu\n"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("root", "path", "inside"),
    [
        ("/", "/a/b", "a/b"),
        ("/", "/", ""),  # a container with a namespace of control groups
        ("/docker/4711", "/docker/4711", ""),  # one without
        ("/docker/4711", "/docker/4711/sub", "sub"),
        ("/", "/../..", ""),  # a process that came from outside
    ],
)
def test_which_memory_limit_holds(tmp_path: Path, version: int, root: str, path: str, inside: str) -> None:
    """Files as the kernel shows them: bytes that it can take back are not used; each group around counts."""
    mount, proc = tmp_path / "cgroup", tmp_path / "proc"
    folder = mount / inside
    folder.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO.format(0))
    (proc / "self/cgroup").write_text(f"0::{path}\n" if version == 2 else f"5:cpu:/x\n4:hugetlb,memory:{path}\n0::/\n")
    (proc / "self/mountinfo").write_text((V2 if version == 2 else V1).format(root=root, mount=mount))
    names = ["memory.max", "memory.current"] if version == 2 else ["memory.limit_in_bytes", "memory.usage_in_bytes"]
    prefix = "" if version == 2 else "total_"

    def say(folder: Path, limit: object, used: int, cached: int) -> None:
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached}\n{prefix}active_file 1000\n")

    none = "max" if version == 2 else 2**63 - PAGE
    say(folder, none, 10**6, 0)
    assert memory.shortage(10**9, proc) is None
    short = memory.shortage(5 * 10**9, proc)
    assert short is not None
    assert (short.whose, short.left) == ("this machine", 4_000_000 * 1024)

    say(folder, 10**6, 900_000, 300_000)
    assert memory.shortage(401_000, proc) is None
    assert memory.shortage(401_001, proc) == memory.Room(401_000, 10**6, str(folder))
    if inside:
        say(folder, none, 10**6, 0)
        say(folder.parent, 10**6, 900_000, 0)
        assert memory.shortage(101_001, proc) == memory.Room(101_000, 10**6, str(folder.parent))
        say(folder.parent, none, 10**6, 0)

    say(folder, 10**6, 900_000, 0)
    (proc / "meminfo").write_text(MEMINFO.format(10))
    if version == 2:
        (folder / "memory.swap.max").write_text("max\n")
        assert memory.shortage(101_000 + 10 * 1024, proc) is None
        (folder / "memory.swap.max").write_text("5000\n")
        (folder / "memory.swap.current").write_text("3000\n")
        assert memory.shortage(103_001, proc) == memory.Room(103_000, 10**6, str(folder))
    else:
        (folder / "memory.memsw.limit_in_bytes").write_text("1002000\n")
        (folder / "memory.memsw.usage_in_bytes").write_text("900000\n")
        assert memory.shortage(103_001, proc) == memory.Room(103_000, 10**6, str(folder))


def test_a_system_that_tells_nothing_about_memory(tmp_path: Path) -> None:
    assert memory.shortage(2**60, tmp_path) is None


# --- the clock ------------------------------------------------------------------------------------------------------
STEP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* The time of day of this process is an hour ahead of the kernel's: as if the clock were set back by an hour after each
   look at it. A wait that counts on it is told to end an hour too late, exactly as one that sleeps when it is set. */
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int status = real(now, zone);
    now->tv_sec += 3600;
    return status;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 3600;
    return status;
}
"""


def test_the_clock_is_set_back_while_somebody_waits_for_a_lock(name: str, tmp_path: Path) -> None:
    """The holder of a lock dies while another process sleeps: nobody will wake it, so it has to wake by itself."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a clock with that is wrong")
    (tmp_path / "step.c").write_text(STEP)
    library = tmp_path / "step.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "step.c"), "-ldl"], check=True)
    with Cache(name, max_bytes="256KB", shards=1, lock_timeout=0.2) as cache, Family() as family:
        other = family.python(LD_PRELOAD=str(library))
        assert other.ask("int(__import__('time').time())") > time.time() + 3000
        other.ask(f"(c := Cache({name!r}, lock_timeout=0.2))")
        word = cache._attachment.geometry.region(0).header + layout.S_LOCK

        # A live holder: the waiter gives up after `lock_timeout`.
        cache._attachment.words[word] = cache._attachment.member.owner
        assert "LockTimeout" in other.ask("c.set('key', 1)")
        waits = cache.stats().lock_waits
        other.tell("c.set('key', 2)")
        until(lambda: cache._attachment.words[cache._attachment.geometry.region(0).header + layout.S_WAITERS])
        cache._attachment.words[word] = 0
        other.answer()
        assert cache.stats().lock_waits > waits

        # A dead one: the waiter takes over.
        def die() -> None:
            with Cache(name) as mine:
                mine._attachment.words[word] = mine._attachment.member.owner
                os.kill(os.getpid(), signal.SIGKILL)

        assert family.fork(die).wait() == -signal.SIGKILL
        assert other.ask("c.set('key', 3)") is None
        assert cache.get("key") == 3
        assert cache.stats().recoveries == 1
        assert other.finish() == (0, "")
