"""What a new process pays before it has its first value."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.loops import Bench
from benchmarks.peers import Peer
from benchmarks.workloads.base import Figure, Room, Workload

SCRIPT = """
import time
start = time.perf_counter_ns()
{script}
taken = time.perf_counter_ns() - start
assert result in ('value', b'value'), result
print(taken)
"""


class Start(Workload):
    """A process that makes or attaches a store and gets one value, and one that is there for nothing."""

    name = "start"
    title = "A process from import to the first value"
    needs = ()
    heavy = False

    def rooms(self) -> list[Room]:
        return [Room("str 20", 100)]

    def takes(self, peer: type[Peer], room: Room) -> bool:
        return super().takes(peer, room) and bool(peer.attach or peer.create)

    def prepare(self, bench: Bench) -> None:
        pass

    def round(self, bench: Bench, number: int) -> list[Figure]:
        figures = []
        name = f"{bench.store.name}-{number}"
        scripts = {"import, create, first get": bench.peer.create, "import, attach, first get": bench.peer.attach}
        for what, script in scripts.items():
            if script:
                script = bench.peer.fill_in(script, name)
                inside, whole = run(script)
                figures += [Figure(what, "ms", inside), Figure(f"whole process: {what}", "ms", whole)]
        if bench.peer.remove:
            run(bench.peer.fill_in(bench.peer.remove, name))
        return figures


def run(script: str) -> tuple[float, float]:
    """ms of the script in a process of its own, by its own clock and as seen from outside."""
    start = time.perf_counter_ns()
    command = [sys.executable, "-c", SCRIPT.format(script=script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole = time.perf_counter_ns() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout) / 1e6, whole / 1e6
