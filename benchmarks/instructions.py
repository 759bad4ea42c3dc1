"""Instructions of an operation, counted by valgrind's callgrind: a figure that no neighbour and no clock disturbs.

Each operation is performed a few times and many times; the difference is what the operations took, with the loop around
them, as in the other figures. `budget.json` holds what an operation may take at most; a test compares.

    python -m benchmarks.instructions             # count
    python -m benchmarks.instructions --record    # and make that the budget
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import click

BUDGET = Path(__file__).with_name("budget.json")
TOLERANCE = 0.08  # compilers and C libraries differ, and malloc finds a kilobyte now here, now there
FEW, MANY = 200, 4200

OPERATIONS = {
    "get str": "get(short)",
    "get dict": "get(record)",
    "get 1 KiB": "get(kilobyte)",
    "set": "set(short, text)",
    "miss": "get(absent)",
    "delete": "delete(short); set(short, text)",  # less a set, which overwrites: with what inserting takes more
    "memoize hit": "function(short)",
}

# callgrind writes down what it has counted, and starts from 0, whenever the process calls this function.
MARK = "getppid"

CHILD = """
import sys
from os import getppid as mark
from shmcache import Cache
from benchmarks.data import VALUES

short, record, kilobyte, absent = "user:1:short", "user:1:record", "user:1:kilobyte", "user:1:absent"
text = VALUES["str 20"]
with Cache(sys.argv[1], max_bytes="4MB") as cache:
    get, set, delete = cache.get, cache.set, cache.delete
    set(short, text), set(record, VALUES["dict 5"]), set(kilobyte, VALUES["1 KiB"])
    function = cache.memoize()(lambda key: text)
    mark()
{loops}
    cache.unlink()
"""


def why_missing() -> str | None:
    return None if shutil.which("valgrind") else "valgrind is not installed"


def script() -> str:
    loops = [
        f"    for _ in range({times}): {statement}\n    mark()"
        for statement in OPERATIONS.values()
        for times in (FEW, MANY)
    ]
    return CHILD.format(loops="\n".join(loops))


def count() -> dict[str, float]:
    """Instructions of each operation; about ten seconds."""
    with tempfile.TemporaryDirectory() as place:
        command = [
            *("valgrind", "--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={place}/counts"),
            *(sys.executable, "-c", script(), f"shmbench-{os.getpid()}-counted"),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"valgrind failed: {done.stderr[-500:]}")
        # One for each mark, in order; the first is of the start, and the last, of the end, has no number.
        dumps = sorted(Path(place).glob("counts.*"), key=lambda file: int(file.suffix[1:]))[1:]
        totals = [int(re.findall(r"^totals: (\d+)", file.read_text(), re.MULTILINE)[0]) for file in dumps]
    few_and_many = list(pairwise(totals))[::2]
    counts = {name: (many - few) / (MANY - FEW) for name, (few, many) in zip(OPERATIONS, few_and_many, strict=True)}
    counts["delete"] -= counts["set"]
    return counts


def budget() -> dict[str, float] | None:
    """What each may take on this Python, or None if that was not recorded."""
    recorded: dict[str, dict[str, float]] = json.loads(BUDGET.read_text())
    return recorded.get(version())


def version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


@click.command()
@click.option("--record", is_flag=True, help="Make these counts the budget of this Python.")
def main(record: bool) -> None:
    """Count the instructions of each operation."""
    if reason := why_missing():
        raise click.ClickException(reason)
    counts = {name: round(each) for name, each in count().items()}
    allowed = budget() or {}
    for name, each in counts.items():
        over = name in allowed and each > allowed[name] * (1 + TOLERANCE)
        print(
            f"{name:12} {each:8,}   budget {allowed.get(name, '-'):>8}" + over * f"   more than {TOLERANCE:.0%} above"
        )
    if record:
        recorded = json.loads(BUDGET.read_text()) | {version(): counts}
        BUDGET.write_text(json.dumps(recorded, indent=4) + "\n")


if __name__ == "__main__":
    main()
