"""A page that is slow to make, computed once for all gunicorn workers.

Run it from this directory, and ask for the same page a few times:

    pip install 'shmcache[demo]'
    CACHE_NAME=pages gunicorn -c gunicorn.conf.py gunicorn_app:app
    curl http://127.0.0.1:8000/report/7

The first answer takes half a second. The next ones do not, whichever worker gives them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from shmcache import Cache

# The workers attach to one cache by its name, whether they import this module each or inherit it (preload_app).
cache = Cache.from_env(max_bytes="16MB", default_ttl=60)


@cache.memoize(ttl=30, name="report")
def report(number: int) -> dict[str, int]:
    time.sleep(0.5)  # a slow query
    return {"report": number, "made by": os.getpid()}


def app(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    page, _, argument = environ["PATH_INFO"].strip("/").partition("/")
    if page != "report" or not argument.isdecimal():
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"try /report/7\n"]
    made = report(int(argument))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"worker {os.getpid()} answers with what worker {made['made by']} made\n".encode()]
