"""How long one get hit and one set take, for shmcache and for what else a Python program might use.

    pip install shmcache cachetools diskcache
    python quick_timing.py

Peers that are not installed are left out. The values are a str of 20 characters and a dict of five fields; each figure
is the best of several rounds, by one process that has nothing else to do. A machine of another speed gives other
figures: look at the ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

import shmcache

KEY = "user:1234"
VALUES = ("a str of 20 letters.", {"id": 1234, "name": "Ada", "mail": "ada@example.org", "active": True, "score": 9.5})

Pair = tuple[Callable[[str], Any], Callable[[str, Any], Any]]


def peers(directory: str) -> Iterator[tuple[str, Pair]]:
    """The name of each cache, its `get` and its `set`, both with a time to live where there is one."""
    with shmcache.Cache(f"quick-timing-{os.getpid()}", max_bytes="16MB", default_ttl=300, ephemeral=True) as cache:
        yield "shmcache", (cache.get, cache.set)

    packed: dict[str, bytes] = {}
    pack, unpack = msgpack.packb, msgpack.unpackb
    yield (
        "dict and msgpack (one process, no bound, no expiry)",
        (lambda key: unpack(packed[key]), lambda key, value: packed.__setitem__(key, pack(value))),
    )

    try:
        import cachetools
    except ModuleNotFoundError:
        pass
    else:
        ttl_cache: Any = cachetools.TTLCache(100_000, 300)
        yield (
            f"cachetools {version('cachetools')} TTLCache (one process, no lock, no copy)",
            (ttl_cache.get, ttl_cache.__setitem__),
        )

    try:
        import diskcache
    except ModuleNotFoundError:
        pass
    else:
        with diskcache.Cache(directory) as disk:
            yield (
                f"diskcache {version('diskcache')} (in {directory})",
                (disk.get, lambda k, v: disk.set(k, v, expire=300)),
            )


def version(name: str) -> str:
    return importlib.metadata.version(name)


def nanoseconds(function: Callable[[], Any], rounds: int, number: int) -> float:
    """The best time of one call; `number` calls a round, or fewer if that would take more than a fifth of a second."""
    timer = timeit.Timer(function)
    number = max(1, min(number, int(0.2 / max(timer.timeit(10) / 10, 1e-9))))
    return min(timer.repeat(rounds, number)) / number * 1e9


def measure(rounds: int, number: int) -> Iterator[tuple[str, list[float]]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        for name, (get, put) in peers(directory):
            figures = []
            for value in VALUES:
                put(KEY, value)
                assert get(KEY) == value
                figures.append(nanoseconds(lambda get=get: get(KEY), rounds, number))  # type: ignore[misc]
                figures.append(nanoseconds(lambda put=put, value=value: put(KEY, value), rounds, number))  # type: ignore[misc]
            yield name, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--number", type=int, default=200_000, help="calls a round, at most")
    options = parser.parse_args()
    mode = "compiled" if shmcache.is_compiled() else "NOT compiled"
    print(
        f"shmcache {shmcache.__version__}, {mode}; CPython {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n"
    )
    rows = [("ns per call", ["get str", "set str", "get dict", "set dict"])]
    rows += [
        (name, [f"{figure:,.0f}" for figure in figures]) for name, figures in measure(options.rounds, options.number)
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["| " + " | ".join([name.ljust(width), *(cell.rjust(8) for cell in cells)]) + " |" for name, cells in rows]
    lines.insert(1, f"|{'-' * (width + 2)}|" + "---------:|" * 4)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
