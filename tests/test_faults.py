"""What an application does to a process behind the cache's back, and single words of the segment that lie."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from shmcache import Cache, CorruptSegment, LockTimeout, SerializationError, is_compiled, segment
from shmcache.engine import journal, layout, reader, shard
from shmcache.engine.primitives import key_hash, load, store
from tests.conftest import Clock
from tests.processes import Child, Gate, until


def run(program: str, name: str) -> str:
    """Run a program in an interpreter of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, name], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_ephemeral_cache_lives_without_standard_descriptors(name: str) -> None:
    """With stdin, stdout and stderr closed no file of the cache gets one of their numbers."""
    program = """
import os, sys
from shmcache import Cache
out = os.dup(1)
for fd in (0, 1, 2):
    os.close(fd)
cache = Cache(sys.argv[1], max_bytes="1MB", ephemeral=True)
cache.set("key", "value")
taken = [fd for fd in (0, 1, 2) if os.path.exists(f"/proc/self/fd/{fd}")]
os.write(out, f"{taken} {min(cache._attachment.segment_fd, cache._attachment.lock_fd) > 2} {cache.get('key')}".encode())
os.close(out)
"""
    assert run(program, name) == "[] True value"


def test_a_daemon_that_closes_all_descriptors_attaches_anew(name: str) -> None:
    """Afterwards the process is attached as before, keeps its entries, and no file of the application is closed."""
    program = """
import os, sys
from shmcache import Cache
class Clock:
    now = 10**15
    def __call__(self):
        self.now += 10**9
        return self.now
cache = Cache(sys.argv[1], max_bytes="1MB", clock=Clock())
cache.set("key", "value")
os.closerange(3, 100)
mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
values = {cache.get("key") for _ in range(5)}
for fd in mine:
    assert os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev
print(values, cache.stats().processes, cache._attachment.is_current())
"""
    assert run(program, name) == "{'value'} 1 True\n"


@pytest.mark.parametrize("field", ["S_ENTRIES", "S_FREE_BLOCKS"])
@pytest.mark.parametrize("lie", [0, 1 << 40, (1 << 64) - 1])
def test_a_count_that_lies_ends_in_an_error_at_worst(make_cache: Callable[..., Cache], field: str, lie: int) -> None:
    """No operation loops for ever over a wrong count, and repair rights it."""
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=2)
    for number in range(100):
        cache.set(number, "x" * 3000)
    for number in range(2):
        store(cache._attachment.words, cache._attachment.geometry.region(number).header + getattr(layout, field), lie)
    for number in range(200, 260):
        try:
            cache.set(number, "y" * 20_000)
        except CorruptSegment:
            break
    cache.repair()
    cache.set("after", 1)
    assert cache.get("after") == 1


def test_an_increment_that_has_to_wait_for_room_adds_once(make_cache: Callable[..., Cache]) -> None:
    """One shard has all entries, the other none: the other evicts elsewhere, then stores what was asked for."""
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=2)
    by_shard: dict[int, list[str]] = {0: [], 1: []}
    for number in range(1000):
        cache.set(f"key{number}", 0)
        by_shard[cache.info(f"key{number}").shard].append(f"key{number}")
    cache.clear()
    for key in by_shard[0]:
        cache.set(key, 0)
    for number in (0, 1):
        region = cache._attachment.geometry.region(number)
        assert load(cache._attachment.words, region.header + layout.S_ENTRIES) == (64, 0)[number]
    assert cache.incr(by_shard[1][0], 1, initial=100) == 101
    assert cache.get(by_shard[1][0]) == 101
    with cache.batch() as batch:
        sums = [batch.incr(key, 1, initial=100) for key in by_shard[1][1:9]]
    assert {each.value for each in sums} == {101}
    assert len(cache) == 64


def test_a_time_to_live_that_ends_while_it_is_asked_for(make_cache: Callable[..., Cache], clock: Clock) -> None:
    """The answer is of the moment of the look-up, never negative and never the age of the universe."""
    step = 0

    def ticking() -> int:
        clock.advance(step / 10)
        return clock()

    cache = make_cache(max_bytes="1MB", max_entries=10, clock=ticking)
    cache.set("key", 1, ttl=1)
    step = 6
    left = cache.ttl("key")
    assert left is not None
    assert 0 < left <= 1
    with pytest.raises(KeyError):
        cache.ttl("key")


def test_files_that_stay_open_elsewhere(name: str) -> None:
    """Closing a cache closes its descriptors; those of another cache stay."""
    before = len(os.listdir("/proc/self/fd"))
    cache = Cache(name, max_bytes="1MB")
    cache.close()
    assert name in segment.names()
    del cache
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the mapping's own duplicate may wait for the collector


def test_a_waiter_whose_cache_is_closed_robs_nobody(make_cache: Callable[..., Cache]) -> None:
    """Another thread closes the cache and opens files; the waiter gives up instead of asking the wrong file."""
    owner = make_cache(max_bytes="1MB")
    program = """
import os, sys, threading
from shmcache import Cache, CacheClosed
cache = Cache(sys.argv[1], lock_timeout=20)
def write():
    try:
        cache.set("key", "robbed")
    except CacheClosed:
        print("gave up")
waiter = threading.Thread(target=write)
waiter.start()
while not cache.stats().lock_waits and not cache._attachment.words[cache._attachment.geometry.region(0).header + 1]:
    pass
cache.close()
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
waiter.join()
"""
    words = owner._attachment.words
    lock = owner._attachment.geometry.region(0).header + layout.S_LOCK
    store(words, lock, owner._attachment.member.owner)
    try:
        assert run(program, owner.name) == "gave up\n"
        assert load(words, lock) == owner._attachment.member.owner
    finally:
        store(words, lock, 0)
    assert "key" not in owner


def test_the_size_of_an_entry_fits_its_field() -> None:
    """However large a shard is, key and value together have less than 4 GiB."""
    geometry = layout.Geometry.plan(16 << 30, 1000, 1)
    assert geometry.max_entry_bytes == (1 << 32) - 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_who_has_become_another_user_goes_on_but_cannot_unlink(name: str) -> None:
    """A worker that drops root keeps the cache of its master; that it cannot remove it is said, not passed over."""
    program = """
import os, sys
from shmcache import Cache
cache = Cache(sys.argv[1], max_bytes="1MB")
if os.fork() == 0:
    os.setuid(65534)
    cache.set("key", "value")
    try:
        cache.unlink()
    except PermissionError as error:
        print("belongs to uid 0" in str(error), cache.get("key"), flush=True)
    os._exit(0)
os.wait()
"""
    assert run(program, name) == "True value\n"


def leave_half_done(cache: Cache, key: str) -> None:
    """What a process leaves that dies in the midst of overwriting this key's entry, before its first logged store."""
    words, region = cache._attachment.words, cache._attachment.geometry.region(0)
    version = cache.info(key).version
    [slot] = [
        number
        for number in range(cache._attachment.geometry.slots)
        if load(words, region.slots + number * layout.SLOT_WORDS) == version
    ]
    stamp = load(words, region.header + layout.S_STAMP) + 2
    store(words, region.header + layout.S_LOCK, (63 << 48) | 12_345)  # nobody
    store(words, region.header + layout.S_STAMP, stamp)
    store(words, region.header + layout.S_SUBJECT, slot + 1)
    store(words, region.slots + slot * layout.SLOT_WORDS, stamp - 1)


@pytest.mark.parametrize(
    "look",
    [
        lambda cache: cache.info("key") is not None,
        lambda cache: list(cache.keys()) == ["key"],
        lambda cache: list(cache.items()) == [("key", "value")],
        lambda cache: "key" in cache,
        lambda cache: cache.ttl("key") is None,
        lambda cache: cache.get("key") == "value",
    ],
    ids=["info", "keys", "items", "in", "ttl", "get"],
)
def test_whoever_looks_recovers_what_a_dead_writer_left(
    make_cache: Callable[..., Cache], look: Callable[[Cache], bool]
) -> None:
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=1)
    cache.set("key", "value")
    leave_half_done(cache, "key")
    assert look(cache)


def test_a_version_of_an_unlinked_cache_is_none_of_the_next(name: str) -> None:
    """Somebody unlinks the cache, makes another one and stores the key: `cas` with the old version must fail."""
    cache = Cache(name, max_bytes="1MB")
    try:
        for _ in range(10):
            cache.set("key", "mine")
            _, version = cache.gets("key")
            cache.unlink()
            cache = Cache(name, max_bytes="1MB")
            cache.set("key", "somebody else's")
            assert not cache.cas("key", "mine again", version)
    finally:
        cache.close()


def test_a_value_that_cannot_be_read_is_the_outcome_of_its_operation_only(make_cache: Callable[..., Cache]) -> None:
    pickling = make_cache(max_bytes="1MB", serializer="pickle")
    cache = make_cache(pickling.name)
    pickling.set("pickled", {1, 2})
    with cache.batch() as batch:
        total = batch.incr("total", 5, initial=0)
        pickled = batch.get("pickled")
    assert total.value == cache["total"] == 5
    with pytest.raises(SerializationError, match="pickle"):
        pickled.value  # noqa: B018


def test_a_group_that_is_stopped_half_way_says_what_was_done(make_cache: Callable[..., Cache]) -> None:
    """The lock of the second shard cannot be had: what the first one did counts, the rest raises."""
    cache = make_cache(max_bytes="1MB", max_entries=100, shards=2, lock_timeout=0.05)
    by_shard: dict[int, list[str]] = {0: [], 1: []}
    for number in range(20):
        cache.set(f"key{number}", 0)
        by_shard[cache.info(f"key{number}").shard].append(f"key{number}")
    before = cache.stats()
    lock = cache._attachment.geometry.region(1).header + layout.S_LOCK
    end = Gate()

    def hold() -> None:
        cache._attached()  # a forked child takes a place of its own
        store(cache._attachment.words, lock, cache._attachment.member.owner)
        end.wait()

    holder = Child(hold)
    until(lambda: load(cache._attachment.words, lock))
    with pytest.raises(LockTimeout), cache.batch() as batch:
        pending = {key: batch.incr(key) for keys in by_shard.values() for key in keys}
    for key in by_shard[0]:
        assert pending[key].value == 1
    for key in by_shard[1]:
        with pytest.raises(LockTimeout):
            pending[key].value  # noqa: B018
    with pytest.raises(LockTimeout):
        cache.set_many(dict.fromkeys(pending, 7))
    end.open()
    assert holder.wait() == 0
    assert cache.get_many(pending) == {key: 7 if key in by_shard[0] else 0 for key in pending}
    assert cache.stats().sets - before.sets == 2 * len(by_shard[0])


def test_many_small_writes_at_once_take_little_memory(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes="8MB")
    numbers = {number: number for number in range(5000)}
    cache.set_many(numbers)
    tracemalloc.start()
    try:
        cache.set_many(numbers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2000 * len(numbers)


@pytest.mark.skipif(is_compiled(), reason="compiled, no other thread runs while one is in the section")
def test_closing_waits_for_a_thread_that_is_writing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the thread would look dead while it writes, and another process would take its lock."""
    cache, other = Cache(name, max_bytes="1MB"), ForkedWriter(name)
    cache.set("key", "a" * 500)
    writing, go_on = threading.Event(), threading.Event()
    write_entry = shard.Shard.write_entry

    def slow(self: Any, request: Any) -> None:
        writing.set()
        assert go_on.wait(30)
        write_entry(self, request)

    monkeypatch.setattr(shard.Shard, "write_entry", slow)
    writer = threading.Thread(target=lambda: cache.set("key", "b" * 900))
    closer = threading.Thread(target=cache.close)
    writer.start()
    assert writing.wait(30)
    closer.start()
    other.write()
    until(lambda: cache._attachment is None or cache._attachment.guard.fd == -1)
    assert not other.has_written()
    go_on.set()
    writer.join()
    closer.join()
    until(other.has_written)
    other.end()
    with Cache.attach(name) as cache:
        assert cache.get("key") == "b" * 900
        assert cache.get("other") == "z" * 700


class ForkedWriter:
    """A process that writes one entry when it is told to."""

    def __init__(self, name: str) -> None:
        self.start, self.done = Gate(), mmap.mmap(-1, 1)
        self.child = Child(self.work, name)

    def work(self, name: str) -> None:
        self.start.wait()
        with Cache.attach(name) as cache:
            cache.set("other", "z" * 700)
        self.done[0] = 1

    def write(self) -> None:
        self.start.open()

    def has_written(self) -> bool:
        return self.done[0] == 1

    def end(self) -> None:
        assert self.child.wait() == 0


@pytest.mark.skipif(is_compiled(), reason="steps a reader through the sources")
def test_undoing_an_insertion_hides_no_neighbour(
    make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader stands in the slot that a rollback gives back to the free ones: it looks again, and finds its key."""
    cache = make_cache(max_bytes="1MB", max_entries=8, shards=1)
    words, region, part = cache._attachment.words, cache._attachment.geometry.region(0), cache._attachment.shards[0]

    def bucket(key: str) -> int:
        data = key.encode()
        return int(part.table.bucket_of(key_hash(data, len(data), layout.KEY_TEXT, *cache._attachment.secret)))

    cache.set("base", "there")
    neighbour = next(f"k{number}" for number in range(1000) if bucket(f"k{number}") == bucket("base"))
    left = []
    commit = journal.Journal.commit

    def die(self: Any, slot: int) -> None:
        left.append(bytes(cache._attachment.data))
        commit(self, slot)

    monkeypatch.setattr(journal.Journal, "commit", die)
    cache.set(neighbour, "x")
    monkeypatch.undo()
    cache._attachment.data[:] = left[0]
    store(words, region.header + layout.S_LOCK, 0)
    real_load = reader.load_acquire
    stepped: list[bool] = []

    def load_acquire(view: memoryview, index: int) -> int:
        found = real_load(view, index)
        if index == bucket("base") and not stepped:
            stepped.append(True)
            part.recover_locked()
        return int(found)

    monkeypatch.setattr(reader, "load_acquire", load_acquire)
    assert cache.get("base") == "there"
    assert stepped


class Forks:
    """A value whose pickling forks; the child goes on with the operation."""

    child = 0

    def __reduce__(self) -> tuple[Any, ...]:
        Forks.child = os.fork()
        return bytes, (b"x",)


def test_a_child_that_is_forked_by_the_serializer_is_a_process_of_its_own(make_cache: Callable[..., Cache]) -> None:
    """If it went on under its parent's name, its death would leave a lock that a live process seems to have."""
    cache = make_cache(max_bytes="1MB", shards=1, serializer="pickle")
    parent = os.getpid()
    owner = cache._attachment.member.owner
    for store_it in (cache.set, lambda key, value: cache.set_many({key: value})):
        try:
            store_it("key", Forks())
        finally:
            if os.getpid() != parent:
                os._exit(0 if cache._attachment.member.owner not in (0, owner) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(Forks.child, 0)[1]) == 0
        assert cache._attachment.member.owner == owner


def test_a_waiter_moves_to_the_new_cache_when_the_old_one_is_unlinked(
    make_cache: Callable[..., Cache], clock: Clock
) -> None:
    """Nobody closed anything: it waits for a lock of a cache that is gone, and another thread has attached anew."""
    cache = make_cache(max_bytes="1MB", shards=1, lock_timeout=30, clock=clock)
    old = cache._attachment
    lock = old.geometry.region(0).header + layout.S_LOCK
    end = Gate()

    def hold() -> None:
        cache._attached()
        store(old.words, lock, cache._attachment.member.owner)
        end.wait()

    holder = Child(hold)
    until(lambda: load(old.words, lock))
    waiter = threading.Thread(target=lambda: cache.set("key", "value"))
    waiter.start()
    until(lambda: load(old.words, lock - layout.S_LOCK + layout.S_WAITERS))
    run("import sys; from shmcache import Cache; Cache(sys.argv[1]).unlink()", cache.name)
    clock.advance(1)
    assert cache.get("key") is None
    assert cache._attachment is not old
    waiter.join(30)
    assert cache.get("key") == "value"
    end.open()
    assert holder.wait() == 0
