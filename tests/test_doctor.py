"""`shmcache doctor` names what is wrong, and `shmcache repair` mends what it can: with real processes and files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import posix_ipc
import pytest

from shmcache import Cache, CacheNotFound, is_compiled, segment
from shmcache.cli import doctor
from shmcache.cli.doctor import Finding, examine
from shmcache.cli.text import show_size
from shmcache.engine import layout
from shmcache.engine.bytelock import REAPER_BYTE, SETUP_BYTE, holders
from tests.holders import hold
from tests.processes import Family, environment, no_gc

Make = Callable[..., Cache]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with the engine of this process."""
    command = [sys.executable, "-W", "error", "-m", "shmcache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**env), timeout=60)


def diagnosis(name: str) -> tuple[int, list[Finding]]:
    """The exit status, and the findings about one cache."""
    done = run("doctor", name, "--json")
    assert done.stderr == ""
    findings = [Finding(**each) for each in json.loads(done.stdout)]
    return done.returncode, [each for each in findings if each.about == name]


def problems(name: str) -> list[Finding]:
    """What is wrong with one cache; the exit status says that there is something."""
    status, findings = diagnosis(name)
    found = [each for each in findings if each.level == "problem"]
    assert not found or status == 1
    assert all(each.do for each in found)
    return found


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.fixture
def path(name: str) -> Path:
    """Where the shared memory of the cache `name` is."""
    return Path(segment.DIRECTORY) / segment.file_name(name)


@pytest.fixture
def small(make_cache: Make) -> Cache:
    cache = make_cache(max_bytes="256KB", max_entries=64, shards=1)
    cache.set("kept", "value")
    return cache


# --- all is well ----------------------------------------------------------------------------------------------------
def test_a_sound_cache_has_no_problem(small: Cache) -> None:
    status, findings = diagnosis(small.name)
    assert {each.level for each in findings} == {"ok"}
    places, *others = [each.found for each in findings]
    assert re.fullmatch(r"\d+ of 64 places for processes are taken", places)
    assert others == ["no lock is held for long", "no contradictions"]
    done = run("doctor", small.name)
    assert done.returncode == status
    assert f"ok       {small.name}: no contradictions\n" in done.stdout
    whole = [json.loads(run("doctor", small.name, "--json").stdout)][0]
    assert {"engine", segment.DIRECTORY, "open files"} <= {each["about"] for each in whole}
    assert all(list(each) == ["level", "about", "found", "do"] for each in whole)
    assert status == any(each["level"] == "problem" for each in whole)


def test_it_changes_nothing(small: Cache) -> None:
    before = small.stats()
    list(examine(small.name))
    run("doctor", small.name)
    after = small.stats()
    assert (after.hits, after.sets, after.entries) == (before.hits, before.sets, before.entries)


def test_a_missing_cache_is_one_line_and_status_1(name: str) -> None:
    for command in ("doctor", "repair"):
        for options in ([], ["--json"]):
            done = run(command, name, *options)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"Error: there is no cache named {name!r}: `shmcache ls` lists those of this user\n"


def test_without_a_name_every_cache_is_looked_at(make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [make_cache(max_bytes="1MB") for _ in range(2)]
    assert {cache.name for cache in caches} <= {*segment.names()}
    # Those of others are theirs.
    monkeypatch.setattr(segment, "names", lambda: ["no name", *(cache.name for cache in caches)])
    about = [each.about for each in examine() if each.found == "no contradictions"]
    assert about == [cache.name for cache in caches]


# --- files ----------------------------------------------------------------------------------------------------------
def test_a_semaphore_without_a_cache(name: str, path: Path) -> None:
    semaphore = posix_ipc.Semaphore(f"/{path.name}~0", posix_ipc.O_CREX, mode=0o600)
    semaphore.close()
    finding = only(problems(name))
    assert finding.found == "semaphores are left of it, and nothing else"
    assert finding.do == f"`rm {segment.DIRECTORY}/sem.{path.name}~*`"
    subprocess.run(["sh", "-c", finding.do.strip("`")], check=True)
    assert run("doctor", name).returncode == 1  # there is nothing of that name any more
    with pytest.raises(CacheNotFound):
        list(examine(name))


def test_shared_memory_without_a_lock_file(name: str, path: Path) -> None:
    Cache(name, max_bytes="1MB").close()
    Path(segment.lock_path(name)).unlink()
    finding = only(problems(name))
    assert "lock file is gone" in finding.found
    assert f"shmcache unlink {name}" in str(finding.do)
    assert run("unlink", name).returncode == 0
    assert not path.exists()


def test_a_lock_file_without_shared_memory(name: str, path: Path) -> None:
    Cache(name, max_bytes="1MB").close()
    path.unlink()
    finding = only(problems(name))
    assert "no shared memory" in finding.found
    assert run("unlink", name).returncode == 0


def test_what_is_whole_a_moment_later_is_not_stale(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_path = Path(segment.lock_path(name))
    lock_path.touch(mode=0o600)
    monkeypatch.setattr(time, "sleep", lambda seconds: path.touch(mode=0o600))
    assert list(doctor.stale_files(name)) == []
    assert path.exists()
    assert segment.unlink(name)


def test_a_cache_that_was_never_finished(name: str, path: Path) -> None:
    lock = os.open(segment.lock_path(name), os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(lock, 1)
    os.close(lock)
    path.touch(mode=0o600)
    finding = only(problems(name))
    assert finding.found == f"the creation of cache {name!r} was never finished"
    assert f"`shmcache unlink {name}` removes it" in str(finding.do)
    assert run("unlink", name).returncode == 0


@pytest.mark.parametrize(
    ("word", "value", "said"),
    [
        (layout.H_VERSION, layout.LAYOUT_VERSION + 1, "layout version"),
        (layout.H_FLAGS, 0 if is_compiled() else layout.FLAG_COMPILED, "compiled processes and this one is"),
        (layout.H_MAGIC, 0x1234, "is not a cache"),
        (layout.H_SHARDS, 63, "does not describe"),
    ],
)
def test_a_cache_of_another_kind_is_named(name: str, path: Path, word: int, value: int, said: str) -> None:
    Cache(name, max_bytes="1MB").close()
    fd = os.open(path, os.O_RDWR)
    before = os.pread(fd, 8, 8 * word)
    os.pwrite(fd, value.to_bytes(8, sys.byteorder), 8 * word)
    finding = only(problems(name))
    assert said in finding.found
    os.pwrite(fd, before, 8 * word)
    os.close(fd)
    assert problems(name) == []


def test_files_that_are_none(name: str, path: Path) -> None:
    """A FIFO, which blocks who opens it, and a directory."""
    Path(segment.lock_path(name)).touch(mode=0o600)
    os.mkfifo(path, 0o600)
    assert only(problems(name)).do
    path.unlink()
    path.mkdir()
    assert only(problems(name)).do
    path.rmdir()
    Path(segment.lock_path(name)).unlink()
    os.mkfifo(segment.lock_path(name), 0o600)
    path.touch(mode=0o600)
    assert only(problems(name)).do
    path.unlink()
    Path(segment.lock_path(name)).unlink()


def test_a_stopped_reaper(name: str) -> None:
    with Family() as family:
        user = family.python()
        user.ask(f"globals().update(cache=Cache({name!r}, max_bytes='1MB', ephemeral=True))")
        assert problems(name) == []
        reaper = next(pid for byte, pid in (holders(segment.lock_path(name)) or {}).items() if byte == REAPER_BYTE)
        os.kill(reaper, signal.SIGSTOP)
        finding = only(problems(name))
        assert f"process {reaper}, which should remove it, is stopped" in finding.found
        assert finding.do == f"`kill -CONT {reaper}`, or end it"
        os.kill(reaper, signal.SIGCONT)
        assert problems(name) == []
        user.ask("cache.close()")


@pytest.fixture
def left_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An ephemeral cache that nobody has, where no other process finds it: to attach to it would be to remove it."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(segment, "DIRECTORY", str(tmp_path))
        words = [0] * layout.HEADER_WORDS
        words[layout.H_MAGIC], words[layout.H_VERSION] = layout.MAGIC, layout.LAYOUT_VERSION
        words[layout.H_FLAGS] = layout.FLAG_EPHEMERAL
        (tmp_path / segment.file_name(name)).write_bytes(struct.pack(f"{len(words)}Q", *words))
        Path(segment.lock_path(name)).touch(mode=0o600)
        yield name


def test_an_ephemeral_cache_that_everybody_left(left_over: str) -> None:
    finding = only([*doctor.cache(left_over)])
    assert (finding.level, finding.about) == ("problem", left_over)
    assert "its last process is gone" in finding.found
    assert finding.do == f"`shmcache unlink {left_over}`"


def test_a_reaper_that_is_stopped_while_it_keeps_everybody_out(left_over: str) -> None:
    """Attaching would wait for it without end."""

    def stop() -> None:
        file = os.open(segment.lock_path(left_over), os.O_RDWR)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, REAPER_BYTE)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGSTOP)

    with Family() as family, no_gc():
        family.fork(stop).wait_until_stopped()
        finding = [*doctor.cache(left_over)][-1]
        assert finding.level == "problem"
        assert "has kept everybody out for 1.0 s" in finding.found
        assert "look for a stopped process" in str(finding.do)


# --- processes ------------------------------------------------------------------------------------------------------
def test_a_stopped_process_that_holds_a_lock(small: Cache) -> None:
    with Family() as family, no_gc():
        holder = family.fork(hold, small)
        holder.wait_until_stopped()
        held, unchecked = problems(small.name)
        assert re.match(
            rf"the lock of shard 0 has been held for at least [\d.]+ s by process {holder.pid}, attached ", held.found
        )
        assert "which is stopped" in held.found
        assert str(held.do).startswith(f"`kill -CONT {holder.pid}` ")
        assert "could not be compared: a live process" in unchecked.found
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0
    assert problems(small.name) == []


def test_a_dead_process_that_held_a_lock_is_no_problem(small: Cache) -> None:
    with Family() as family, no_gc():
        holder = family.fork(hold, small)
        holder.wait_until_stopped()
        holder.kill()
    status, findings = diagnosis(small.name)
    assert status == run("doctor", small.name).returncode
    assert (
        "has ended: whoever wants it next takes it over"
        in only([each for each in findings if each.level != "ok"]).found
    )


def test_a_stopped_process_in_the_midst_of_attaching(small: Cache) -> None:
    def stop(path: Path) -> None:
        file = os.open(path, os.O_RDWR)
        fcntl.lockf(file, fcntl.LOCK_EX, 1, SETUP_BYTE)
        os.kill(os.getpid(), signal.SIGSTOP)

    with Family() as family, no_gc():
        stopped = family.fork(stop, segment.lock_path(small.name))
        stopped.wait_until_stopped()
        who, what = problems(small.name)
        assert who.found == f"process {stopped.pid}, which creates, attaches to or unlinks it, is stopped"
        assert "longer than lock_timeout allows" in what.found
    assert problems(small.name) == []


def test_nobody_has_it_attached(small: Cache) -> None:
    began = time.time()
    with Cache(small.name):
        pass
    assert small.stats().created <= doctor._last_attached(doctor._header(small.name)) <= time.time()
    stats = replace(small.stats(), processes=1)
    finding = only([*doctor.idle(stats, began - 90)])
    assert finding.level == "info"
    assert re.fullmatch(
        r"no process has it attached; the last one, or a command, came 1 min \d+ s ago, and it takes 256.0 KiB",
        finding.found,
    )
    assert finding.do == f"if nobody needs it any more, `shmcache unlink {small.name}`"
    assert list(doctor.idle(replace(stats, processes=2), began)) == []


def test_the_process_table_is_nearly_full(small: Cache) -> None:
    stats = small.stats()
    for processes, level in ((1, "ok"), (58, "ok"), (59, "problem"), (64, "problem")):
        finding = only([*doctor.process_table(small, replace(stats, processes=processes))])
        assert (finding.level, finding.found) == (level, f"{processes - 1} of 64 places for processes are taken")


# --- contents -------------------------------------------------------------------------------------------------------
def test_what_check_finds_is_repaired(small: Cache) -> None:
    words, header = small._attachment.words, small._attachment.geometry.region(0).header
    words[header + layout.S_ENTRIES] += 1
    finding = only(problems(small.name))
    assert "contradict themselves: shard 0: " in finding.found
    assert f"`shmcache repair {small.name}`" in str(finding.do)
    done = run("repair", small.name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{small.name}: nothing was dropped\n", "")
    assert problems(small.name) == []
    assert small.get("kept") == "value"


def test_repair_says_what_it_dropped(small: Cache) -> None:
    words, region = small._attachment.words, small._attachment.geometry.region(0)

    def break_an_entry() -> None:
        slots = range(region.slots, region.blocks, layout.SLOT_WORDS)
        slot = next(at for at in slots if words[at + layout.E_PLACE] & 0xFFFF_FFFF)
        words[slot + layout.E_HASH] ^= 1

    break_an_entry()
    done = run("repair", small.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == ["shard 0"]
    assert len(small) == 0
    small.set("kept", "value")
    break_an_entry()
    done = run("repair", small.name, "--json")
    dropped = json.loads(done.stdout)
    assert (done.returncode, dropped["name"], len(dropped["dropped"])) == (0, small.name, 1)
    assert json.loads(run("repair", small.name, "--json").stdout) == {"name": small.name, "dropped": []}


def test_a_full_cache_that_evicts_much_is_information(make_cache: Make) -> None:
    cache = make_cache(max_bytes="1MB", max_entries=10, shards=1)
    cache.set_many(dict.fromkeys(range(10)))
    assert list(doctor.room(cache.stats())) == []
    cache.set_many(dict.fromkeys(range(10, 30)))
    finding = only([*doctor.room(cache.stats())])
    assert (finding.level, finding.about) == ("info", cache.name)
    assert finding.found == "max_entries is nearly used up, and 20 entries were evicted for 30 stored"
    cache.clear()
    assert list(doctor.room(cache.stats())) == []


# --- the machine ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gone", [errno.ENOENT, errno.EACCES])
def test_a_directory_that_is_missing_or_unreadable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    monkeypatch.setattr(segment, "DIRECTORY", str(tmp_path / "shm"))
    if gone == errno.EACCES:  # root may read everything

        def refuse(path: object) -> list[str]:
            raise PermissionError(gone, os.strerror(gone), path)

        (tmp_path / "shm").mkdir()
        monkeypatch.setattr(os, "listdir", refuse)
    for wanted in (name, None):
        findings = [each for each in examine(wanted) if each.level == "problem"]
        assert [each.found for each in findings][-1] == f"it cannot be listed ({os.strerror(gone)})"
        assert all(each.do for each in findings)
    monkeypatch.undo()


def test_a_machine_without_shared_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, that is what is wrong."""
    monkeypatch.setattr(segment, "DIRECTORY", str(tmp_path))
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) != "/dev/shm" and is_dir(path))
    for wanted in (name, None):
        finding = only([each for each in examine(wanted) if each.about == "/dev/shm"])
        assert (finding.level, finding.found) == ("problem", "it is missing, so no cache can be created")
    monkeypatch.undo()


def test_a_shared_memory_where_others_may_remove_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Kubernetes emptyDir is."""
    monkeypatch.setattr(segment, "DIRECTORY", str(tmp_path))
    for mode, expected in ((0o1777, 0), (0o700, 0), (0o777, 1)):
        tmp_path.chmod(mode)
        found = [each for each in doctor.shared_memory() if "sticky bit" in each.found]
        assert len(found) == expected
    assert (found[0].level, str(found[0].do).partition(",")[0]) == ("info", f"`chmod 1777 {tmp_path}`")


@pytest.mark.parametrize(
    ("free", "total", "levels"),
    [
        (4 * 2**30, 8 * 2**30, ["ok"]),
        (2**29, 8 * 2**30, ["info"]),
        (1000, 8 * 2**30, ["problem"]),
        (60 * 2**20, 64 * 2**20, ["ok", "info"]),
        (0, 64 * 2**20, ["problem", "info"]),
        (0, 0, ["ok"]),  # a tmpfs without a limit
    ],
)
def test_what_is_left_of_shared_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, total: int, levels: list[str]
) -> None:
    room = SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: room)
    findings = list(doctor.shared_memory())
    assert [each.level for each in findings] == levels
    assert all(each.do for each in findings if each.level != "ok")
    assert findings[0].found.startswith(f"{show_size(free)} free of {show_size(total)}")


@pytest.mark.parametrize(
    ("files", "space", "levels"),
    [
        (1024, resource.RLIM_INFINITY, ["ok"]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, ["ok"]),
        (100, resource.RLIM_INFINITY, ["info"]),
        (32, 2**30, ["problem", "info"]),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, files: int, space: int, levels: list[str]) -> None:
    said = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_AS: space}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (said[what], resource.RLIM_INFINITY))
    findings = list(doctor.limits())
    assert [each.level for each in findings] == levels
    assert all(each.do for each in findings if each.level != "ok")


def test_little_memory_is_named_with_whose_limit_it_is(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1048576 kB\nMemAvailable: 262144 kB\nSwapFree: 0 kB\n")
    assert [each.level for each in doctor.memory_limit(tmp_path)] == ["ok"]
    meminfo.write_text("MemTotal: 1048576 kB\nMemAvailable: 40960 kB\nSwapFree: 0 kB\n")
    finding = only([*doctor.memory_limit(tmp_path)])
    assert finding.level == "info"
    assert finding.found == "40.0 MiB left of the 1.0 GiB of this machine: no larger cache can be created"
    assert "`MemoryMax=`" in str(finding.do)


def test_logind_is_named_only_where_its_configuration_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    directories = [str(tmp_path / "lib"), str(tmp_path / "etc")]
    assert list(doctor.logind(directories)) == []
    (tmp_path / "etc" / "logind.conf.d").mkdir(parents=True)
    (tmp_path / "etc" / "logind.conf").write_text("[Login]\n#RemoveIPC=yes\n")
    assert list(doctor.logind(directories)) == []
    (tmp_path / "etc" / "logind.conf").write_text("[Login]\nRemoveIPC=yes\n")
    finding = only([*doctor.logind(directories)])
    assert finding.level == "info"
    assert f"RemoveIPC=yes in {tmp_path}/etc/logind.conf" in finding.found
    monkeypatch.setattr(os, "geteuid", lambda: 33)
    assert list(doctor.logind(directories)) == [], "a system user is spared"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "etc" / "logind.conf.d" / "keep.conf").write_text("[Login]\nRemoveIPC=no\n")
    assert list(doctor.logind(directories)) == []


def test_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_compiled", lambda: True)
    assert [each.level for each in doctor.engine()] == ["ok"]
    monkeypatch.setattr(doctor, "is_compiled", lambda: False)
    for value, level in (("1", "info"), ("", "problem"), ("0", "problem")):
        monkeypatch.setenv("SHMCACHE_PURE", value)
        finding = only([*doctor.engine()])
        assert finding.level == level
        assert finding.do
