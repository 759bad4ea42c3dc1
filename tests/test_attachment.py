"""What a process holds while it has caches: no lock is lost, no descriptor leaks, and no cache holds up another."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmcache import Cache, CacheClosed, CacheNotFound, LockTimeout, attachment, descriptors, is_compiled, segment
from shmcache.engine import layout
from shmcache.engine.bytelock import is_byte_locked, under_setup_lock
from tests.conftest import Clock, new_name
from tests.holders import lock_word
from tests.processes import DEADLINE, Child, Family, Gate, files, until

SMALL = 256 * 1024


def is_held(cache: Cache) -> bool:
    """Whether others see that this process lives: by the lock file that the cache has open, whatever its name."""
    fd, line = cache._attachment.lock_fd, cache._attachment.registry.own_line

    def look() -> None:
        assert is_byte_locked(fd, line)

    return Child(look).wait() == 0


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def lose_locks(name: str) -> None:
    """As code does that looks into every file of /dev/shm."""
    os.close(os.open(segment.lock_path(name), os.O_RDONLY))


# --- locks of this process ------------------------------------------------------------------------------------------
def test_an_object_that_moves_drops_no_lock_of_one_that_has_not(name: str) -> None:
    """The segment is removed, not its lock file, which who moves looks at once more."""
    clocks = Clock(), Clock()
    with Cache(name, max_bytes=SMALL, clock=clocks[0]) as first, Cache(name, clock=clocks[1]) as second:
        (Path(segment.DIRECTORY) / segment.file_name(name)).unlink()
        clocks[0].advance(1)
        first.set("key", 1)
        assert first._attachment is not second._attachment
        assert is_held(first)
        assert is_held(second)
        segment.unlink(name)
        assert is_held(second)
        clocks[1].advance(1)
        assert second.get("key") is None
        clocks[0].advance(1)
        assert first.get("key") is None
        assert first._attachment is second._attachment
        assert is_held(first)
        assert first.check() == []


def test_an_unlinked_cache_is_held_while_the_name_is_unlinked_or_looked_at(name: str) -> None:
    clock = Clock()
    with Cache(name, max_bytes=SMALL, clock=clock) as cache:
        (Path(segment.DIRECTORY) / segment.file_name(name)).unlink()
        assert not segment.is_left_over(name, 1.0)
        assert is_held(cache)
        assert segment.unlink(name)
        assert is_held(cache)
        assert not segment.unlink(name)


def test_a_lock_file_has_one_descriptor_also_if_it_gets_its_name_meanwhile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is kept open as long as the first."""
    with Cache(name, max_bytes=SMALL) as cache:
        monkeypatch.setattr(descriptors, "_known", lambda path: None)
        lock_file = segment.open_lock_file(name, create=False)
        assert lock_file is cache._attachment.lock_file
        del lock_file
        assert is_held(cache)


def test_a_lock_that_other_code_has_dropped_is_taken_again(make_cache: Callable[..., Cache], clock: Clock) -> None:
    cache = make_cache(max_bytes=SMALL, shards=1, clock=clock)
    before = cache._attachment.member.owner
    lose_locks(cache.name)
    assert not is_held(cache)
    clock.advance(1)
    cache.set("key", 1)
    assert is_held(cache)
    assert cache._attachment.member.owner == before
    lose_locks(cache.name)
    Cache(cache.name).close()  # no need for a clock
    assert is_held(cache)


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_place_that_another_process_took_meanwhile_is_given_up(
    make_cache: Callable[..., Cache], clock: Clock, is_gone: bool
) -> None:
    """Otherwise two processes would be one to all others."""
    cache = make_cache(max_bytes=SMALL, shards=1, clock=clock)
    before, registry = cache._attachment.member.owner, cache._attachment.registry
    for line in range(1, registry.processes):  # as if a process had died in each
        cache._attachment.words[registry.line(line) + layout.P_PID] = 1
    cache._attachment.words[registry.line(0) + layout.P_NAMESPACE] = 1  # where nobody here can see that it lives
    lose_locks(cache.name)
    gate, taken = Gate(), Gate()

    def take() -> None:
        with Cache(cache.name) as own:
            assert own._attachment.member.owner == before + 1
            taken.open()
            gate.wait()
            os._exit(0)

    with Family() as family:
        child = family.fork(take)
        taken.wait()
        if is_gone:
            gate.open()
            assert child.wait() == 0
        clock.advance(1)
        cache.set("key", 1)
        assert cache._attachment.member.owner not in (0, before)
        assert is_held(cache)
        assert cache.stats().processes == (1 if is_gone else 2)
        if not is_gone:
            assert cache._attachment.member.owner >> 48 != before >> 48
            gate.open()
            assert child.wait() == 0
    assert cache.get("key") == 1


def test_a_line_is_kept_by_who_took_it_only(make_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was forked behind our back takes another. Once the lock file is closed there is nothing to keep."""
    registry = make_cache(max_bytes=SMALL)._attachment.registry
    assert registry.has_line()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_own_epoch", 0)
        assert not registry.has_line()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "fd", -1)
        assert registry.has_line()
    line, generation = registry.own_line, registry.own_generation
    registry.take_line(1)  # another thread was faster
    assert (registry.own_line, registry.own_generation) == (line, generation)
    assert registry.has_line()


def test_a_child_that_closes_its_caches_drops_nothing_of_its_parent(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes=SMALL)
    cache.set("key", 1)

    def child() -> None:
        own = Cache(cache.name)
        cache.close()
        assert own.get("key") == 1
        assert is_held(own)
        own.close()

    assert Child(child).wait() == 0
    assert is_held(cache)


# --- unlinking ------------------------------------------------------------------------------------------------------
def test_unlinking_waits_for_a_creation_that_began_after_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no lock file when `unlink` looks for it; then a creator comes, and has made its segment but not all."""
    Cache(name, max_bytes=SMALL).close()
    Path(segment.lock_path(name)).unlink()
    real = segment.open_lock_file
    creators: list[Child] = []

    def begin() -> None:
        monkeypatch.setattr(segment, "complete", lambda _: os.kill(os.getpid(), signal.SIGSTOP))
        Cache(name, max_bytes=SMALL).close()

    def open_lock_file(name: str, create: bool) -> Any:
        monkeypatch.setattr(segment, "open_lock_file", real)
        try:
            return real(name, create)
        finally:
            creators.append(family.fork(begin))
            creators[0].wait_until_stopped()

    with Family() as family:
        monkeypatch.setattr(segment, "open_lock_file", open_lock_file)
        with pytest.raises(LockTimeout):
            segment.unlink(name, 0.05)
        assert segment.file_name(name) in files(name)
        creators[0].kill()
    assert segment.unlink(name)
    assert files(name) == []


@pytest.mark.parametrize("kept", ["segment", "lock file", "semaphores"])
def test_unlinking_what_is_left_of_a_cache(name: str, kept: str) -> None:
    """Whichever files are missing, none is left; there was a cache if there was more than semaphores."""
    Cache(name, max_bytes=SMALL).close()
    own = segment.file_name(name)
    for file in files(name):
        if file != {"segment": own, "lock file": f"{own}~lock", "semaphores": f"sem.{own}~0"}[kept]:
            (Path(segment.DIRECTORY) / file).unlink()
    assert len(files(name)) == 1
    assert segment.unlink(name) is (kept != "semaphores")
    assert files(name) == []
    assert segment.unlink(name) is False
    assert files(name) == []


# --- nothing leaks --------------------------------------------------------------------------------------------------
class Struck(Exception):
    """What a signal handler raises."""


@contextlib.contextmanager
def storm(seconds: float) -> Iterator[None]:
    """Signals whose handler raises, one that long after each `setitimer`."""

    def strike(*_: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("ephemeral", [False, True])
def test_a_signal_handler_that_raises_while_a_cache_is_opened_or_closed_leaks_nothing(
    name: str, ephemeral: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Struck at any moment, creating and attaching: no descriptor stays open, no user counted, no lock held."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps what is raised in finalizers
    monkeypatch.setattr(attachment, "_start_reaper", lambda *_: None)  # `subprocess` may leak its pipes
    Cache(name, max_bytes=SMALL).unlink()
    before, struck = descriptor_count(), 0

    def attempt(after: float) -> bool:
        """Whether it was struck."""
        cache = None
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            cache = Cache(name, max_bytes=SMALL, ephemeral=ephemeral)
            cache.set("key", 1)
            cache.close()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Struck:
            return True
        finally:
            del cache
        return False

    with storm(0):
        for number in range(400):
            # Within what comes and goes with the setting of the timer itself, now and then.
            with contextlib.suppress(Struck):
                struck += attempt((number % 100 + 1) * 2e-5)
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert struck > 5
    Cache(name, max_bytes=SMALL).close()
    assert descriptor_count() == before

    def attach() -> None:
        with Cache(name, max_bytes=SMALL, lock_timeout=1) as cache:
            assert cache.stats().processes == 1
            assert cache.check() == []

    assert Child(attach).wait() == 0
    with Cache(name, max_bytes=SMALL) as cache:
        assert cache.stats().processes == 1
        assert cache.check() == []
    assert descriptor_count() == before


def strike_once(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> None:
    """Raise as a signal handler would, right after a function has returned."""
    real = getattr(module, function)

    def stand_in(*args: Any) -> Any:
        real(*args)
        monkeypatch.setattr(module, function, real)
        raise Struck

    monkeypatch.setattr(module, function, stand_in)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (segment, "open_lock_file"),
        (descriptors, "open_lock_file"),
        (descriptors, "open_shared_memory"),
        (attachment, "under_setup_lock"),
        (attachment, "_open"),
        (attachment, "attach"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_was_opened_before_an_exception_is_closed(
    name: str, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    before = descriptor_count()
    strike_once(monkeypatch, module, function)
    try:
        Cache(name, max_bytes=SMALL)
        raise AssertionError("not struck")
    except Struck:
        pass
    assert descriptor_count() == before
    with Cache(name, max_bytes=SMALL) as cache:
        assert cache.stats().processes == 1
        strike_once(monkeypatch, attachment, "attach")
        try:
            Cache(name)
            raise AssertionError("not struck")
        except Struck:
            pass
        assert Child(lambda: Cache(name).close()).wait() == 0
    assert descriptor_count() == before
    assert Child(lambda: check_alone(name)).wait() == 0


def check_alone(name: str) -> None:
    with Cache(name) as cache:
        assert cache.stats().processes == 1


def test_a_collector_that_runs_while_a_cache_is_opened_waits_for_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it finds is detached afterwards: another thread may have what that needs, and wait for what this one has."""
    other = new_name()
    before = descriptor_count()
    dropped = [Cache(other, max_bytes=SMALL)]
    locked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with segment.mutex_of(other):
            locked.set()
            go_on.wait(DEADLINE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(DEADLINE)
    real = segment.create_segment

    def collect(*args: Any) -> Any:
        dropped.clear()
        go_on.set()
        return real(*args)

    monkeypatch.setattr(segment, "create_segment", collect)
    with Cache(name, max_bytes=SMALL):
        holder.join()
        Cache(name).close()
        assert Child(lambda: check_alone(other)).wait() == 0
    assert descriptor_count() == before
    segment.unlink(other)


def test_unlinking_and_making_anew_a_hundred_times_leaks_nothing(name: str) -> None:
    clocks = Clock(), Clock()
    with Cache(name, max_bytes=SMALL, clock=clocks[0]) as first, Cache(name, clock=clocks[1]) as second:
        before = descriptor_count()
        for number in range(100):
            if number % 2:
                segment.unlink(name)
            else:
                (Path(segment.DIRECTORY) / segment.file_name(name)).unlink()
            for clock, cache in zip(clocks, (first, second), strict=True):
                clock.advance(1)
                cache.set("key", number)
            assert first.get("key") == number
        assert descriptor_count() == before
        assert is_held(first)
        assert first.stats().processes == 1


# --- one cache does not hold up another -----------------------------------------------------------------------------
def test_a_cache_that_is_being_attached_to_holds_up_no_other(name: str, make_cache: Callable[..., Cache]) -> None:
    """A stopped process has the setup lock of the one; the other is created, used, closed and unlinked meanwhile."""

    def stop() -> None:
        with Cache(name, max_bytes=SMALL) as cache:
            under_setup_lock(cache._attachment.lock_fd, 5, lambda: os.kill(os.getpid(), signal.SIGSTOP))

    def attach() -> None:
        Cache(name, lock_timeout=DEADLINE).close()
        attached.set()

    attached = threading.Event()
    with Family() as family:
        stopped = family.fork(stop)
        stopped.wait_until_stopped()
        thread = threading.Thread(target=attach)
        thread.start()
        until(lambda: descriptors.is_open(segment.lock_path(name)))
        time.sleep(0.01)  # it waits, or is about to
        other = make_cache(max_bytes=SMALL)
        other.set("key", 1)
        other.unlink()
        assert not attached.is_set()
        stopped.signal(signal.SIGCONT)
        thread.join(DEADLINE)
        assert attached.is_set()
        assert stopped.wait() == 0


@pytest.mark.skipif(is_compiled(), reason="compiled, no other thread runs while one is in the section")
def test_closing_does_not_wait_for_a_thread_that_waits_for_a_lock(name: str) -> None:
    """Uncompiled, a thread may keep the others of its process out while it waits for a process that is stopped."""
    cache = Cache(name, max_bytes=SMALL, shards=1)
    shard, words, word = cache._attachment.shards[0], cache._attachment.words, lock_word(cache)
    entered, left, go_on = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with shard.mutex().lock:
            words[word] = cache._attachment.member.owner
            entered.set()
            assert left.wait(DEADLINE)
            words[word] = 0  # and takes it once more, in vain
            assert go_on.wait(DEADLINE)

    worker, closer = threading.Thread(target=work), threading.Thread(target=cache.close)
    worker.start()
    assert entered.wait(DEADLINE)
    guard = cache._attachment.guard
    closer.start()
    until(lambda: guard.fd == -1)
    assert closer.is_alive()
    left.set()
    closer.join(DEADLINE)
    assert not closer.is_alive()
    go_on.set()
    worker.join()


# --- attached only --------------------------------------------------------------------------------------------------
def test_an_object_that_only_attaches_has_no_cache_until_there_is_one_again(name: str) -> None:
    """Each operation looks; where others have made the cache anew, with whatever geometry, all meet."""
    clock = Clock()
    creator = Cache(name, max_bytes=SMALL)
    with Cache.attach(name, clock=clock) as cache:
        assert Path(segment.DIRECTORY, segment.file_name(name)).exists()
        creator.unlink()
        clock.advance(1)
        for _ in range(2):
            with pytest.raises(CacheNotFound):
                cache.get("key")
            with pytest.raises(CacheNotFound):
                cache.set("key", 1)
        assert files(name) == []
        with Cache(name, max_bytes=2 * SMALL) as anew:
            anew.set("key", "value")
            assert cache.get("key") == "value"
            cache.set("key", 2)
            assert anew.get("key") == 2
            assert cache.max_bytes == 2 * SMALL
            assert cache._attachment is anew._attachment


# --- what other threads, finalizers and subclasses do at the wrong moment -------------------------------------------
def test_what_gets_the_number_of_a_descriptor_that_closes_itself_is_not_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread looks whose the open files are, another one closes its own and opens something else."""
    ours = descriptors.open_file(str(tmp_path / "ours"), os.O_RDWR | os.O_CREAT)
    number, truly = ours.fileno(), descriptors.identity_of
    theirs: list[int] = []

    def identity_of(asked: int) -> tuple[int, int] | None:
        found = truly(asked)
        if asked == number and not theirs:
            theirs.append(-1)
            ours.close_own()
            theirs[0] = os.open(tmp_path / "theirs", os.O_RDWR | os.O_CREAT)
        return found

    monkeypatch.setattr(descriptors, "identity_of", identity_of)
    monkeypatch.setattr(
        descriptors, "_open", {file: (lambda: None, known) for file, (_, known) in descriptors._open.items()}
    )
    descriptors._close_unowned()
    assert theirs == [number]
    assert os.write(number, b"still open") == 10
    os.close(number)


def test_threads_that_open_and_close_caches_close_no_file_of_others(name: str, tmp_path: Path) -> None:
    over = threading.Event()
    wrong: list[object] = []

    def use_caches(own: str) -> None:
        for number in range(60):
            with Cache(own, max_bytes=SMALL) as cache:
                cache.set("key", number)
                assert cache.get("key") == number

    def use_files(path: Path) -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                path.write_text(f"{path.name} {number}")
                if path.read_text() != f"{path.name} {number}":
                    wrong.append(path.read_bytes())
            except OSError as error:
                wrong.append(error)

    own = [f"{name}-{number}" for number in range(3)]
    users = [threading.Thread(target=use_caches, args=(each,)) for each in own]
    others = [threading.Thread(target=use_files, args=(tmp_path / str(number),)) for number in range(2)]
    try:
        for thread in (*others, *users):
            thread.start()
        for thread in users:
            thread.join()
    finally:
        over.set()
        for thread in others:
            thread.join()
        for each in own:
            segment.unlink(each)
    assert wrong == []


def test_a_cache_that_is_closed_while_it_moves_stays_closed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    cache = Cache(name, max_bytes=SMALL, clock=clock)
    truly = attachment.attach

    def attach(*arguments: Any) -> attachment.Attachment:
        attached = truly(*arguments)
        cache.close()
        return attached

    segment.unlink(name)
    monkeypatch.setattr(attachment, "attach", attach)
    clock.advance(1)
    with pytest.raises(CacheClosed):
        cache.set("key", 1)
    monkeypatch.undo()
    with pytest.raises(CacheClosed):
        cache.get("key")
    with Cache(name) as other:
        assert other.stats().processes == 1
        assert len(other._attachment.users) == 1


class Named(Cache):
    """Two that are one to whoever asks."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name == other.name

    __hash__ = None  # type: ignore[assignment]


def test_objects_that_compare_equal_are_two_users(name: str) -> None:
    first, second = Named(name, max_bytes=SMALL, ephemeral=True), Named(name)
    first.set("key", 1)
    first.close()
    assert second.get("key") == 1
    assert is_held(second)
    second.close()
    assert files(name) == []


def test_an_attachment_whose_last_user_is_being_collected_is_not_joined(name: str) -> None:
    """A collector forgets weak references before it runs finalizers, and another thread may come between."""
    cache = Cache(name, max_bytes=SMALL)
    abandoned = cache._attachment
    abandoned.users.clear()
    with Cache(name) as other:
        assert other._attachment is not abandoned
        assert is_held(other)
        other.set("key", 1)
    cache.close()


def test_a_clock_that_is_none_is_refused_before_anything_is_made(name: str) -> None:
    with pytest.raises(TypeError, match=r"clock is a function that returns ns, not int \(5\)"):
        Cache(name, max_bytes=SMALL, clock=5)  # type: ignore[arg-type]
    assert files(name) == []
