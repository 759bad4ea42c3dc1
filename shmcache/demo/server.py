"""The life of the demo's gunicorn: started on a free port, ready when every worker has the cache, ended by its pid."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shmcache.cache import Cache
from shmcache.demo.site import CACHE_VARIABLE

__all__ = ["DemoError", "Server", "require_gunicorn", "serve"]

START_SECONDS = 10.0
STOP_SECONDS = 3.0


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Server:
    """A gunicorn that answers on this port of the loopback interface, with these workers."""

    port: int
    pid: int
    workers: tuple[int, ...]


def require_gunicorn() -> None:
    """Raise DemoError unless gunicorn is installed."""
    if importlib.util.find_spec("gunicorn") is None:
        raise DemoError("the demo needs gunicorn: pip install 'shmcache[demo]'")


@contextlib.contextmanager
def serve(cache: Cache, workers: int) -> Iterator[Server]:
    """Run gunicorn with the site of the demo; it is gone at the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryFile() as output:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GUNICORN")}
        environment[CACHE_VARIABLE] = cache.name
        site = "shmcache.demo.site"
        gunicorn = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--config", f"python:{site}", f"{site}:application"),
                *("--workers", str(workers), "--bind", f"fd://{listener.fileno()}", "--log-level", "warning"),
            ],
            stdin=subprocess.PIPE,  # never written to: the workers see its end
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is ours
            cwd=Path(__file__).parents[2],  # gunicorn puts it on the path: let it find this very package there
        )
        try:
            port = listener.getsockname()[1]
            listener.close()  # from here on, nobody listens if gunicorn does not
            pids = _wait_until_ready(cache, gunicorn, workers)
            if pids is None:
                output.seek(0)
                said = output.read().decode(errors="replace").split("\n")
                last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
                raise DemoError(f"gunicorn did not start {workers} workers within {START_SECONDS:.0f} s: {last}")
            yield Server(port, gunicorn.pid, pids)
        finally:
            _end(gunicorn)


def _wait_until_ready(cache: Cache, gunicorn: subprocess.Popen[bytes], workers: int) -> tuple[int, ...] | None:
    """The pids of the workers once all of them are attached to the cache, or None if that is not to be."""
    deadline = time.monotonic() + START_SECONDS
    while gunicorn.poll() is None and time.monotonic() < deadline:
        pids = tuple(sorted(each.pid for each in cache.stats().attached if each.pid != os.getpid()))
        if len(pids) >= workers:
            return pids
        time.sleep(0.02)
    return None


def _end(gunicorn: subprocess.Popen[bytes]) -> None:
    """End gunicorn, which ends its workers; if it does not, end its process group."""
    assert gunicorn.stdin is not None
    with contextlib.suppress(OSError):
        gunicorn.stdin.close()
    gunicorn.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            gunicorn.wait(STOP_SECONDS)
    finally:
        if gunicorn.poll() is None:
            os.killpg(gunicorn.pid, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
            gunicorn.wait()
