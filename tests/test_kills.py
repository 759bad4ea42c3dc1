"""A process that holds a lock and is stopped, or killed: it is waited for, and never robbed, or succeeded at once.

Kills at random moments are in tests/torture/kills.py.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from shmcache import Cache, LockTimeout
from shmcache.engine import layout
from tests.holders import hold, lock_word, waiters
from tests.processes import Family, Gate, no_gc, until
from tests.torture import kills
from tests.torture.campaign import Trial
from tests.torture.stalls import Stalls

STALL = 0.05  # seconds after a holder's death within which others work on; more is the machine's, and seen rarely
HANGS = 10.0  # seconds that nothing takes which does not hang, whatever else the machine has to do


def milliseconds(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1e3:.2f}, max {ordered[-1] * 1e3:.2f} ms"


@pytest.fixture(autouse=True)
def cheap_forks() -> Iterator[None]:
    with no_gc():
        yield


@pytest.fixture
def small(make_cache: Callable[..., Cache]) -> Cache:
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1, lock_timeout=0.3)
    cache.set("kept", "value")
    return cache


def test_a_stopped_holder_is_waited_for_and_never_robbed(small: Cache) -> None:
    with Family() as family:
        holder = family.fork(hold, small)
        holder.wait_until_stopped()
        owner = small._attachment.words[lock_word(small)]
        for attempt in (
            lambda: small.set("key", 1),
            lambda: small.delete("kept"),
            lambda: small.incr("n", initial=0),
            lambda: small.set_many({"a": 1}),
            small.clear,
            small.purge,
            small.check,
        ):
            began = time.monotonic()
            with pytest.raises(LockTimeout, match="live process"):
                attempt()
            assert 0.3 <= time.monotonic() - began < 0.3 + HANGS
        began = time.monotonic()
        for _ in range(100):
            assert small.get("kept") == "value"
            assert small.get("missing", "nothing") == "nothing"
            assert list(small.items()) == [("kept", "value")]
            assert small.ttl("kept") is None
        assert time.monotonic() - began < HANGS, "readers waited for the lock"
        assert small._attachment.words[lock_word(small)] == owner
        assert waiters(small) == 0, "those who gave up still count as waiting"

        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
        small.set("key", 2)
        assert dict(small.items()) == {"kept": "value", "from the holder": "after all", "key": 2}
        assert small.stats().recoveries == 0


def test_a_killed_holder_is_succeeded_at_once(small: Cache, show: Callable[[str], None]) -> None:
    took = []
    with Family() as family:
        for number in range(20):
            holder = family.fork(hold, small)
            holder.wait_until_stopped()
            holder.signal(signal.SIGKILL)
            began = time.perf_counter()
            small.set("key", number)
            took.append(time.perf_counter() - began)
            assert holder.wait() == -signal.SIGKILL
            assert small.check() == []
            assert small.get("key") == number
            assert small.stats().recoveries == number + 1
    show(f"taking over from a killed holder: {milliseconds(took)}")
    assert sorted(took)[len(took) // 2] < STALL
    assert max(took) < HANGS


def test_all_waiters_go_on_when_the_holder_is_killed(make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(max_bytes=256 * 1024, max_entries=64, shards=1)
    with Family() as family:
        holder = family.fork(hold, cache)
        holder.wait_until_stopped()
        writers = [family.fork(cache.set, f"writer {number}", number) for number in range(8)]
        until(lambda: waiters(cache) == 8)
        holder.kill()
        began = time.monotonic()
        assert [writer.wait() for writer in writers] == [0] * 8
        assert time.monotonic() - began < HANGS
    assert dict(cache.items()) == {f"writer {number}": number for number in range(8)}
    assert cache.stats().recoveries == 1


def test_what_a_killed_holder_left_half_done_is_undone(small: Cache) -> None:
    """A transaction by hand: the log has the old value, the slot the new one, and its version is odd."""
    version = small.gets("kept")[1]

    def begin(cache: Cache) -> None:
        words = cache._attachment.words
        region = cache._attachment.geometry.region(0)
        [slot] = [
            number
            for number in range(cache.max_entries)
            if words[region.slots + number * layout.SLOT_WORDS + layout.E_PLACE] & 0xFFFF_FFFF
        ]
        at = region.slots + slot * layout.SLOT_WORDS
        words[region.header + layout.S_STAMP] += 2
        words[region.header + layout.S_SUBJECT] = slot + 1
        words[at + layout.E_VERSION] = words[region.header + layout.S_STAMP] - 1
        for field, value in ((layout.E_EXPIRY, 1), (layout.E_SIZES, 0), (layout.E_HASH, 0)):
            used = words[region.log + layout.L_USED]
            words[region.log + layout.L_ENTRIES + 2 * used] = at + field
            words[region.log + layout.L_ENTRIES + 2 * used + 1] = words[at + field]
            words[region.log + layout.L_USED] = used + 1
            words[at + field] = value

    with Family() as family:
        holder = family.fork(hold, small, begin)
        holder.wait_until_stopped()
        assert small.get("kept", "unknown") == "unknown", "a reader saw half a change"
        holder.kill()
        assert small.get("kept") == "value"
    assert small.check() == []
    after = small.gets("kept")[1]
    assert after is not None
    assert version is not None
    assert after > version, "a reader that overlapped the dead writer would accept what it saw"


def test_a_worker_killed_while_it_attaches_leaves_its_place(name: str) -> None:
    """With 64 places, none may be lost to processes that died at any moment between fork and first operation."""
    rng = random.Random(5)

    def attach(gate: Gate) -> None:
        gate.wait()
        with Cache(name, max_bytes=256 * 1024) as cache:
            while True:
                cache.set("again", 0)

    with Cache(name, max_bytes=256 * 1024) as cache, Family() as family:
        cache.set("kept", "value")
        for _ in range(100):
            gate = Gate()
            children = [family.fork(attach, gate) for _ in range(2)]
            gate.open()
            time.sleep(rng.random() * 0.004)
            for child in children:
                child.signal(signal.SIGKILL)
            for child in children:
                assert child.wait() == -signal.SIGKILL
            cache.set("again", 1)
            assert cache.stats().processes == 1
        assert cache.get("kept") == "value"
        assert cache.check() == []


def test_a_reader_waits_once_for_a_shard_whose_holder_is_stopped_in_a_removal(small: Cache) -> None:
    """The sequence number is odd, so that no miss counts: each key that is missing would wait as long again."""

    def begin(cache: Cache) -> None:
        cache._attachment.words[cache._attachment.geometry.region(0).header + layout.S_SEQUENCE] |= 1

    with Family() as family:
        holder = family.fork(hold, small, begin)
        holder.wait_until_stopped()
        before = small.stats().lock_waits
        found = small.get_many([*range(20), "kept", *range(20, 40)])
        assert found == {"kept": "value"}
        assert small.stats().lock_waits == before + 1
        assert small.get("missing") is None
        assert small.stats().lock_waits == before + 2, "another call does not wait, because one before has"
        holder.kill()
    assert small.get_many(["kept", "missing"]) == {"kept": "value"}


def test_a_scan_waits_once_for_a_shard_whose_holder_is_stopped(small: Cache) -> None:
    """Were more than one of its slots in a change, which only a lie can make them be."""
    small.set_many(dict.fromkeys(range(10), "value"))

    def begin(cache: Cache) -> None:
        region = cache._attachment.geometry.region(0)
        for slot in range(3):
            cache._attachment.words[region.slots + slot * layout.SLOT_WORDS + layout.E_VERSION] |= 1

    with Family() as family:
        holder = family.fork(hold, small, begin)
        holder.wait_until_stopped()
        before = small.stats().lock_waits
        assert len(list(small.keys())) == 8
        assert small.stats().lock_waits == before + 1
        holder.kill()
    assert small.repair() == []


# --- what tests/torture/kills.py notices ----------------------------------------------------------------------------
def hang(cache: Cache, ledger: kills.Ledger, worker: int, seed: str) -> None:
    """A worker as in a storm, but one of them has an operation that does not end, whatever it is told."""
    rng = random.Random(seed)
    while not ledger.word(worker, ledger.STOP):
        endless = worker == 1 and rng.random() < 0.5
        ledger.stalls.timed(worker, signal.pause if endless else lambda: cache.set(("key", worker), worker))


@pytest.mark.parametrize("storm", [storm for storm in kills.STORMS if storm.name != "1,000 entries"])
def test_a_worker_that_hangs_fails_a_storm(monkeypatch: pytest.MonkeyPatch, storm: kills.Storm) -> None:
    monkeypatch.setattr(kills, "HANGS", 0.3)
    monkeypatch.setattr(kills, "CALM", 1)
    monkeypatch.setattr(kills, "STORMS", (storm,))
    monkeypatch.setattr(kills, "work", hang)
    monkeypatch.setattr(kills, "crowd", hang)
    with pytest.raises(AssertionError, match=r"worker 1, process \d+, hangs: \d+\.\d s in one operation"):
        for _ in kills.rounds(Trial(1)):
            pass


def test_a_worker_that_hangs_fails_the_end_of_a_storm(monkeypatch: pytest.MonkeyPatch, small: Cache) -> None:
    monkeypatch.setattr(kills, "HANGS", 0.3)
    with Family() as family:
        workers = [family.fork(signal.pause) for _ in range(kills.WORKERS)]
        with pytest.raises(AssertionError, match=r"still runs after 0\.3 s"):
            kills.end(small, kills.Ledger(), workers)


def test_the_operation_of_a_killed_worker_is_not_its_successors() -> None:
    stalls = Stalls(2)
    with Family() as family:
        worker = family.fork(stalls.timed, 1, signal.pause)
        until(lambda: stalls.so_far(1) > 0)
        worker.kill()
    assert stalls.take().operation > 0, "what it has taken so far counts"
    assert stalls.take(victim=1).operation == 0
    stalls.forget(1)
    assert stalls.so_far(1) == 0
    assert stalls.take().operation == 0


def test_a_storm_that_is_cut_short_is_looked_at_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "CALM", 1)
    monkeypatch.setattr(kills, "STORMS", [storm for storm in kills.STORMS if storm.name == "4 shards"])
    trial = Trial(1, 3)
    storm = kills.rounds(trial)
    for _ in range(3):
        next(storm)
    storm.close()  # type: ignore[attr-defined]  # a generator
    assert trial.counts["kills"] == 3
    assert trial.counts["operations"] > 0
    assert trial.counts["entries found as acknowledged"] == kills.WORKERS * kills.KEYS

    storm = kills.rounds(Trial(2, 3))
    next(storm)
    monkeypatch.setattr(kills, "value_after_death", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storm.close()  # type: ignore[attr-defined]
