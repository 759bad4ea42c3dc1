"""A multiprocessing.Pool whose workers share what they have computed, instead of each computing it again.

Run it from this directory:

    pip install shmcache
    python pool.py fork
    python pool.py spawn
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os

from shmcache import Cache

cache: Cache


def start_worker(shared: Cache) -> None:
    """Runs once in each worker. A forked one inherits the cache, a spawned one gets it pickled; both attach by name."""
    global cache
    cache = shared


def fingerprint(customer: int) -> str:
    key = ("fingerprint", customer)
    value = cache.get(key)
    if value is None:
        value = hashlib.pbkdf2_hmac("sha256", b"%d" % customer, b"salt", 20_000).hex()
        cache.set(key, value)
        cache.incr("computed", initial=0)
    assert isinstance(value, str)
    return value


def main(method: str) -> None:
    tasks = [number % 50 for number in range(2_000)]
    # Ephemeral: the cache is removed with the last process that uses it, even if that is killed.
    with Cache(f"pool-{os.getpid()}", max_bytes="8MB", ephemeral=True) as shared:
        context = multiprocessing.get_context(method)
        with context.Pool(4, initializer=start_worker, initargs=(shared,)) as pool:
            results = pool.map(fingerprint, tasks, chunksize=20)
        stats = shared.stats()
        print(f"{len(results)} tasks, {len(set(results))} customers, {shared['computed']} computations")
        print(f"{stats.hits} hits and {stats.misses} misses of all workers together")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Share what the workers of a pool compute.")
    parser.add_argument("method", nargs="?", default="spawn", choices=multiprocessing.get_all_start_methods())
    main(parser.parse_args().method)
