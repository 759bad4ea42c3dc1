"""The web site of the demo: pages that are slow to make, kept in the cache together with who made them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from shmcache import Cache

__all__ = ["CACHE_VARIABLE", "MISS", "OWN", "SHARED", "application", "post_worker_init"]

CACHE_VARIABLE = "SHMCACHE_DEMO_CACHE"
MISS, OWN, SHARED = "miss", "own", "shared"  # what a worker answers from: nothing, its own work, another worker's
QUERY_SECONDS = 0.06

# Settings that gunicorn reads from this module. Its control socket would be a file in the home directory.
control_socket_disable = True
graceful_timeout = 1

cache: Cache


def post_worker_init(_worker: Any) -> None:
    """Called by gunicorn in each new worker: attach to the cache, and watch whether the demo is still there."""
    global cache
    cache = Cache.attach(os.environ[CACHE_VARIABLE])
    threading.Thread(target=_end_with_the_demo, daemon=True).start()


def _end_with_the_demo() -> None:
    """Standard input is a pipe from the demo; it ends when the demo does, even if that was killed."""
    while os.read(0, 1):
        pass
    os.kill(os.getppid(), signal.SIGTERM)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer `/page/<number>`, and say in headers who answers and who made the page."""
    path = environ["PATH_INFO"]
    page = cache.get(path)
    source = MISS
    if page is None:
        page = {"html": render(path), "maker": os.getpid()}
        cache.set(path, page)
    else:
        source = OWN if page["maker"] == os.getpid() else SHARED
    headers = {"X-Worker": str(os.getpid()), "X-Maker": str(page["maker"]), "X-Source": source}
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), *headers.items()])
    return [page["html"].encode()]


def render(path: str) -> str:
    """Make a page: wait as for the answer of a database, then fill in a table."""
    time.sleep(QUERY_SECONDS)
    rows = "".join(f"<tr><td>{number}</td><td>{number * number:,}</td></tr>" for number in range(100))
    return f"<!doctype html><title>{path}</title><h1>{path}</h1><table>{rows}</table>"
