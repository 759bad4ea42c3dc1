"""What an application does to a process behind the cache's back, and single words of the segment that lie."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from shmcache import Cache, CorruptSegment, segment
from shmcache.engine import layout
from shmcache.engine.primitives import load, store
from tests.conftest import Clock


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
os.write(out, f"{taken} {min(cache.attachment.segment_fd, cache.attachment.lock_fd) > 2} {cache.get('key')}".encode())
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
print(values, cache.stats().processes, cache.attachment.is_current())
"""
    assert run(program, name) == "{'value'} 1 True\n"


@pytest.mark.parametrize("field", ["S_ENTRIES", "S_FREE_BLOCKS"])
@pytest.mark.parametrize("lie", [0, 1 << 40, (1 << 64) - 1])
def test_a_count_that_lies_ends_in_an_error_at_worst(make_cache: Callable[..., Cache], field: str, lie: int) -> None:
    """No operation loops for ever over a wrong count, and repair rights it."""
    cache = make_cache(max_bytes="1MB", max_entries=64, shards=2)
    for number in range(100):
        cache.set(number, "x" * 3000)
    for shard in range(2):
        store(cache.attachment.words, cache.attachment.geometry.region(shard).header + getattr(layout, field), lie)
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
    for shard in (0, 1):
        region = cache.attachment.geometry.region(shard)
        assert load(cache.attachment.words, region.header + layout.S_ENTRIES) == (64, 0)[shard]
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
while not cache.stats().lock_waits and not cache.attachment.words[cache.attachment.geometry.region(0).header + 1]:
    pass
cache.close()
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
waiter.join()
"""
    words = owner.attachment.words
    lock = owner.attachment.geometry.region(0).header + layout.S_LOCK
    store(words, lock, owner.attachment.member.owner)
    try:
        assert run(program, owner.name) == "gave up\n"
        assert load(words, lock) == owner.attachment.member.owner
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
