"""The demo, run as a person runs it: what it shows, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shmcache import segment

COMMAND = [sys.executable, "-W", "error", "-m", "shmcache", "demo"]
LIMIT = 20  # seconds a demo may take in all

pytest.importorskip("gunicorn")


def wait_until_gone(name: str, pids: list[int], seconds: float) -> None:
    """Fail unless soon this cache has no files, and no process is left of these and of those that name it."""
    deadline = time.monotonic() + seconds
    while True:
        files = [path.name for path in Path(segment.DIRECTORY).glob(f"*{name}*")]
        running = [each.pid for each in psutil.process_iter() if _belongs(each, name, pids)]
        if not (files or running):
            return
        assert time.monotonic() < deadline, (files, running)
        time.sleep(0.01)


def _belongs(process: psutil.Process, name: str, pids: list[int]) -> bool:
    try:
        # An orphan that ended is a zombie until whoever adopted it looks.
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and (process.pid in pids or any(name in word for word in process.cmdline()))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


@contextlib.contextmanager
def running_demo(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[int]]]:
    """A demo whose clients are at work, the name of its cache, and the pids of gunicorn and its workers."""
    command = [*COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            server, cache = demo.stdout.readline(), demo.stdout.readline()
            pids = [int(pid) for pid in re.findall(r"\d+", re.sub(r"on [\d.:]+", "", server))]
            found = re.search(r"cache: (demo-\w+)", cache)
            assert found, demo.stderr and demo.stderr.read()
            while "at once" not in demo.stdout.readline():
                pass
            yield demo, found[1], pids
        finally:
            demo.kill()


def test_every_worker_serves_what_others_made_and_nothing_stays() -> None:
    began = time.monotonic()
    done = subprocess.run([*COMMAND, "--json", "--seconds", "2"], capture_output=True, timeout=60)
    took = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, b"")
    said = json.loads(done.stdout)
    workers = said["workers"]
    wait_until_gone(said["stats"]["name"], [worker["pid"] for worker in workers], 1)
    assert took < LIMIT
    assert len(workers) == 4
    assert all(worker["shared"] > 0 for worker in workers)
    for source in ("miss", "own", "shared"):
        assert sum(worker[source] for worker in workers) == said[source]
    assert said["requests"] == said["miss"] + said["own"] + said["shared"]
    assert said["miss_ms"] > said["hit_ms"]

    stats = said["stats"]
    assert (stats["hits"], stats["misses"], stats["sets"]) == (said["own"] + said["shared"], said["miss"], said["miss"])
    assert stats["entries"] == said["pages"]
    assert stats["processes"] == 4
    counted = {worker["pid"]: (worker["own"] + worker["shared"], worker["miss"]) for worker in workers}
    assert {each["pid"]: (each["hits"], each["misses"]) for each in stats["attached"]} == counted
    assert all("gunicorn" in each["command"] for each in stats["attached"])


def test_it_shows_who_answered_from_what() -> None:
    done = subprocess.run([*COMMAND, "--seconds", "1", "--workers", "2"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, _, second = done.stdout.partition("clients at once")
    workers = re.findall(r"\d+", first.splitlines()[0].split("workers ")[1])
    assert len(workers) == 2
    for line in first.splitlines()[4:-2]:
        shown = re.fullmatch(r"  worker (\d+)  /start/\d  +[\d.]+ ms  (miss: .*|hit: .* of its own|hit: .* made)", line)
        assert shown, line
        assert shown[1] in workers
    assert "miss: had to make the page" in first
    for worker in workers:
        assert re.search(rf"^  worker {worker}: \d+ misses, \d+ hits of its own, [\d,]+ of other", second, re.MULTILINE)
        assert re.search(rf"^  worker {worker} served [1-9][\d,]* of them$", second, re.MULTILINE)
    assert re.search(r"^hit ratio +\d", second, re.MULTILINE)
    assert "\x1b" not in done.stdout


def test_on_a_terminal_a_table_stays_in_place() -> None:
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen([*COMMAND, "--seconds", "1", "--workers", "2"], stdout=theirs, env=environment) as demo:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's end of file
            while data := os.read(ours, 1 << 16):
                shown += data
    os.close(ours)
    assert demo.returncode == 0
    assert b"\x1b[4F\x1b[J" in shown
    assert b"\x1b[32mS" in shown


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_nothing_stays(number: signal.Signals, status: int) -> None:
    with running_demo("--seconds", "60") as (demo, name, pids):
        assert len(pids) == 5
        demo.send_signal(number)
        assert demo.wait(LIMIT) == status
        assert demo.stderr is not None
        assert demo.stderr.read() == ""
        wait_until_gone(name, pids, 1)


def test_nothing_stays_even_if_it_is_killed() -> None:
    with running_demo("--seconds", "60", "--workers", "2") as (demo, name, pids):
        demo.kill()
        demo.wait(LIMIT)
        wait_until_gone(name, pids, LIMIT)


def test_gunicorn_killed_meanwhile_is_one_line() -> None:
    with running_demo("--seconds", "60", "--workers", "2") as (demo, name, pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert demo.wait(LIMIT) == 1
        assert demo.stderr is not None
        (line,) = demo.stderr.read().splitlines()
        assert line.startswith("Error: gunicorn did not answer")
        wait_until_gone(name, pids, 1)


def test_a_missing_gunicorn_is_one_line() -> None:
    program = "import sys; sys.modules['gunicorn'] = None; from shmcache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "demo"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "Error: the demo needs gunicorn: pip install 'shmcache[demo]'\n"


def test_a_gunicorn_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "gunicorn"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('no room for workers')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: gunicorn did not start 4 workers")
    assert line.endswith("no room for workers")
