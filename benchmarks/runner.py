"""The process of one peer for one workload: makes it ready, then measures a round whenever it is told to.

`benchmarks.measure` starts it with an address, there to be told what to do. uWSGI runs this file as well, in itself.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path
from typing import NamedTuple

from benchmarks.loops import Bench
from benchmarks.peers import PEERS, Store
from benchmarks.workloads import WORKLOADS, Figure, Scale


class Job(NamedTuple):
    """What to measure, and of what."""

    peer: str
    workload: str
    store: Store
    scale: Scale


def main(address: str) -> None:
    with Client(address, family="AF_UNIX") as connection:
        bench = None
        try:
            job: Job = connection.recv()
            workload = WORKLOADS[job.workload](job.scale)
            bench = Bench(PEERS[job.peer], job.store)
            workload.prepare(bench)
            connection.send([])
            while (number := connection.recv()) is not None:
                figures: list[Figure] = workload.round(bench, number)
                connection.send(figures)
            bench.close()
            bench = None
            connection.send([])
        except EOFError:  # whoever asked is gone
            pass
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            connection.send(reason)  # a str instead of figures
        finally:
            if bench is not None:
                bench.close()


if __name__ == "__main__":
    main(sys.argv[1])
