"""A real gunicorn or uWSGI in a process of its own, on a unix socket, for tests that ask it things over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PATIENCE = 30.0  # seconds for anything that should take far less
CLIENTS = 8  # at once, more than there are workers


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, log: Path) -> None:
        self.process = process
        self.address = address
        self._log = log

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body of one GET; raises OSError or HTTPException if the worker dies meanwhile."""
        connection = _UnixConnection(self.address)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ask_all(self, path: str, workers: int) -> dict[int, Any]:
        """What each of the workers answers, by its pid: asks until that many have answered."""
        answers: dict[int, Any] = {}

        def client(_: int) -> None:
            while len(answers) < workers and time.monotonic() < deadline:
                status, body = self.ask(path)
                assert status == 200, self.log
                answer = json.loads(body)
                answers[answer["pid"]] = answer

        deadline = time.monotonic() + PATIENCE
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        assert len(answers) == workers, f"only {sorted(answers)} of {workers} workers answered\n{self.log}"
        return answers

    def wait_until_all_workers_wait(self) -> None:
        """uWSGI (2.0.31, with any application) loses a signal to a worker that is still starting, and waits for it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            workers = psutil.Process(self.process.pid).children()
            if workers and all(_waits(worker) for worker in workers):
                return
            time.sleep(0.01)
        pytest.fail(f"its workers never came to rest\n{self.log}")

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def serve(command: Callable[[str], list[str]], cache: str, directory: Path) -> Iterator[Server]:
    """Run `command(address)` in `directory` until the block ends; the server must then end by itself, silently."""
    # Not pytest's directory: the address of a unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="shm") as place:
        address, log = f"{place}/socket", Path(place, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(address),
                cwd=directory,
                env={**os.environ, "CACHE_NAME": cache, "HOME": place, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        server = Server(process, address, log)
        try:
            _await_answer(server)
            yield server
            process.terminate()
            process.wait(PATIENCE)
            assert "Traceback" not in server.log, server.log
            assert "resource_tracker" not in server.log, server.log
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server did not end\n{server.log}")
        finally:
            _end(process)


def _waits(process: psutil.Process) -> bool:
    """Whether it has slept for a while, as a worker does that waits for a request."""
    before = process.cpu_times()
    time.sleep(0.1)
    return process.status() == psutil.STATUS_SLEEPING and process.cpu_times() == before


def _await_answer(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"the server ended\n{server.log}"
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            server.ask("/")
            return
        time.sleep(0.01)
    pytest.fail(f"the server does not answer\n{server.log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it running, whatever happened."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(PATIENCE)


def gunicorn(*arguments: str) -> Callable[[str], list[str]]:
    """The command that starts gunicorn at an address."""
    pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    return lambda address: [sys.executable, "-m", "gunicorn", "--bind", f"unix:{address}", *arguments]


def uwsgi(*arguments: str) -> Callable[[str], list[str]]:
    """The command that starts uWSGI at an address."""
    if not (BIN / "uwsgi").exists():
        pytest.skip("uWSGI is not installed")
    return lambda address: [str(BIN / "uwsgi"), "--http-socket", address, *arguments]
