"""A limit on requests per client that all uWSGI workers enforce together.

Run it from this directory, and ask more than ten times within a minute:

    pip install 'shmcache[uwsgi]'
    CACHE_NAME=limits uwsgi --http-socket 127.0.0.1:8001 --ini uwsgi.ini
    curl http://127.0.0.1:8001/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from shmcache import Cache

LIMIT = 10
WINDOW = 60  # seconds

cache = Cache.from_env(max_bytes="16MB")


def application(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    client = environ.get("REMOTE_ADDR") or "local"
    # incr is atomic across processes. It keeps the entry's time to live, so the window begins at the first request.
    requests = cache.incr(("requests", client), initial=0, ttl=WINDOW)
    if requests > LIMIT:
        start_response("429 Too Many Requests", [("Content-Type", "text/plain")])
        return [b"too many requests\n"]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"request {requests} of {LIMIT}, answered by worker {os.getpid()}\n".encode()]
