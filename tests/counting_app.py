"""The WSGI application of test_servers.py: uses the cache, and counts by itself, to be compared with the stats."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from shmcache import Cache

cache = Cache.from_env(max_bytes="4MB")
counts: Counter[str] = Counter()
counting = threading.Lock()
preloaded_by = os.getpid()


def count(what: str) -> None:
    with counting:
        counts[what] += 1


def look_up(key: str) -> object:
    value = cache.get(key)
    count("misses" if value is None else "hits")
    return value


def store(key: str, value: object) -> None:
    cache.set(key, value)
    count("sets")


def sign() -> None:
    """Leave a value that says which worker wrote it."""
    store(f"worker-{os.getpid()}", os.getpid())


def signatures() -> dict[str, object]:
    """What all workers left, as this one sees it."""
    return {key: look_up(key) for key in cache.keys("worker-")}


def work(key: str) -> int:
    """Read, fill and delete keys that all workers use."""
    for number in range(50):
        entry = f"{key}-{number % 20}"
        if look_up(entry) is None:
            store(entry, {"by": os.getpid(), "filling": "x" * (number * 50)})
        elif number % 10 == 0 and cache.delete(entry):
            count("deletes")
    return 50


ACTIONS: dict[str, Callable[..., object]] = {"sign": sign, "signatures": signatures, "work": work}


def app(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    action, *arguments = environ["PATH_INFO"].strip("/").split("/")
    answer = ACTIONS[action](*arguments) if action in ACTIONS else None
    time.sleep(0.005)  # so that while one worker is busy, the next request goes to another
    with counting:
        body = {"pid": os.getpid(), "preloaded by": preloaded_by, "answer": answer, "counts": dict(counts)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
