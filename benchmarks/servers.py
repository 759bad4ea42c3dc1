"""Servers: started on a unix socket in a directory of their own, and ended by pid with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PATIENCE = 20.0  # seconds for a start or an end
SET_DEATH_SIGNAL = 1  # prctl(2)


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel ends this process when its parent ends, in whatever way."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


class Server:
    """A server that listens on a unix socket."""

    def __init__(self, command: list[str], address: Path) -> None:
        self.address = str(address)
        self.log = address.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=address.parent,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + PATIENCE
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{command[0]} does not listen: {self.log.read_text(errors='replace')[-500:]}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(self.address)
            return True
        return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def redis(place: Path, max_bytes: int | None) -> Server:
    """Without persistence and without TCP; `maxmemory-policy allkeys-lru` is its manual's for a cache.

    https://redis.io/docs/latest/operate/oss_and_stack/management/config/ (Configuring Redis as a cache),
    https://redis.io/docs/latest/operate/oss_and_stack/management/optimization/benchmarks/ (unix sockets, persistence)
    """
    address = place / "redis.sock"
    options = {"port": "0", "unixsocket": str(address), "save": "", "appendonly": "no", "daemonize": "no"}
    if max_bytes is not None:
        options |= {"maxmemory": str(max_bytes), "maxmemory-policy": "allkeys-lru"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return Server([str(shutil.which("redis-server")), *arguments], address)


def memcached(place: Path, max_bytes: int | None) -> Server:
    """On a unix socket (`-s`), which disables TCP; items up to 2 MB (`-I`), or a value of 1 MiB would be refused.

    https://docs.memcached.org/serverguide/configuring/
    """
    address = place / "memcached.sock"
    megabytes = max(8, (max_bytes or 4 << 30) >> 20)
    command = [str(shutil.which("memcached")), "-s", str(address), "-m", str(megabytes), "-I", "2m", "-u", "root"]
    return Server(command, address)
