"""Look into a live cache from a process that has nothing to do with those that fill it.

Run it from this directory:

    pip install shmcache
    python attach.py pages
"""

from __future__ import annotations

import sys
from itertools import islice

from shmcache import Cache, CacheNotFound


def main(name: str) -> None:
    try:
        cache = Cache.attach(name)  # unlike Cache(name), never creates one
    except CacheNotFound as error:
        sys.exit(str(error))
    with cache:
        stats = cache.stats()
        print(f"{name}: {stats.entries} entries, {stats.bytes_used} of {stats.max_bytes} bytes used by keys and values")
        print(f"{stats.hits} hits, {stats.misses} misses, {stats.sets} sets")
        for process in stats.attached:
            print(f"process {process.pid}: {process.hits} hits, {process.misses} misses, {process.sets} sets")
        for key, value in islice(cache.items(), 10):
            print(f"{key!r} = {value!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
