"""How long one get hit and one set take, for shmcache and for what else a Python program might use.

Run it from this directory:

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
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]

import shmcache

VALUES = ("a str of 20 letters.", {"id": 1234, "name": "Ada", "mail": "ada@example.org", "active": True, "score": 9.5})
COLUMNS = ["get str", "set str", "get dict", "set dict"]


def peers(directory: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """The name of each cache, how to get and how to set with it, and the names that these statements use."""
    with shmcache.Cache(f"quick-timing-{os.getpid()}", max_bytes="16MB", default_ttl=300, ephemeral=True) as cache:
        yield "shmcache", "cache.get(key)", "cache.set(key, value)", {"cache": cache}

    names = {"packed": {}, "pack": msgpack.packb, "unpack": msgpack.unpackb}
    yield "dict of msgpack bytes", "unpack(packed[key])", "packed[key] = pack(value)", names

    if find_spec("cachetools"):
        import cachetools  # type: ignore[import-untyped, unused-ignore, import-not-found]

        names = {"cache": cachetools.TTLCache(100_000, 300)}
        for get in ("cache.get(key)", "cache[key]"):
            yield f"cachetools.TTLCache {version('cachetools')}, {get}", get, "cache[key] = value", names

    if find_spec("diskcache"):
        import diskcache  # type: ignore[import-untyped, unused-ignore, import-not-found]

        with diskcache.Cache(directory) as disk:
            names = {"cache": disk}
            yield f"diskcache {version('diskcache')}", "cache.get(key)", "cache.set(key, value, expire=300)", names


def version(name: str) -> str:
    return importlib.metadata.version(name)


def nanoseconds(statement: str, names: dict[str, Any], rounds: int, number: int) -> float:
    """The best time of one run; `number` runs a round, or fewer if that would take more than a fifth of a second."""
    timer = timeit.Timer(statement, globals=names)
    number = max(1, min(number, int(0.2 / max(timer.timeit(10) / 10, 1e-9))))
    return min(timer.repeat(rounds, number)) / number * 1e9


def measure(rounds: int, number: int) -> Iterator[tuple[str, list[str]]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        for name, get, put, names in peers(directory):
            figures = []
            for value in VALUES:
                names.update(key="user:1234", value=value)
                exec(put, names)
                assert eval(get, names) == value
                figures += [nanoseconds(statement, names, rounds, number) for statement in (get, put)]
            yield name, [f"{figure:,.0f}" for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one get and one set.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--number", type=int, default=200_000, help="calls a round, at most")
    options = parser.parse_args()
    mode = "compiled" if shmcache.is_compiled() else "NOT compiled"
    python = f"CPython {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs"
    print(f"shmcache {shmcache.__version__}, {mode}; {python}; {time.strftime('%Y-%m-%d')}\n")
    rows = [("ns per call", COLUMNS), *measure(options.rounds, options.number)]
    width = max(len(name) for name, _ in rows)
    lines = ["| " + " | ".join([name.ljust(width), *(cell.rjust(8) for cell in cells)]) + " |" for name, cells in rows]
    lines.insert(1, f"|{'-' * (width + 2)}|" + "---------:|" * len(COLUMNS))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
