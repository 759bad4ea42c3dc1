"""Real application servers with four workers: one cache for all of them, totals that add up, and workers that die."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving import CLIENTS, PATIENCE, Server, gunicorn, serve, uwsgi

HERE = Path(__file__).resolve().parent
WORKERS = 4

GUNICORN = ("--workers", str(WORKERS), "counting_app:app")
UWSGI = (
    *("--master", "--processes", str(WORKERS), "--need-app", "--die-on-term"),
    *("--pythonpath", ".", "--module", "counting_app:app", "--disable-logging"),
)
SERVERS: dict[str, Callable[[], Callable[[str], list[str]]]] = {
    "gunicorn": lambda: gunicorn(*GUNICORN),
    "gunicorn-preload": lambda: gunicorn("--preload", *GUNICORN),
    "gunicorn-threads": lambda: gunicorn("--threads", "3", *GUNICORN),
    # uWSGI forks in C, and Python's at-fork hooks do not run.
    "uwsgi": lambda: uwsgi(*UWSGI),
    "uwsgi-lazy-apps": lambda: uwsgi("--lazy-apps", *UWSGI),
    "uwsgi-threads": lambda: uwsgi("--enable-threads", "--threads", "3", *UWSGI),
}
PRELOADING = {"gunicorn-preload", "uwsgi", "uwsgi-threads"}


@pytest.fixture(params=SERVERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str, name: str) -> Iterator[Server]:
    with serve(SERVERS[kind](), name, HERE) as server:
        yield server


def stats_from_another_terminal(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "shmcache", "stats", name, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert answer.returncode == 0, answer.stderr
    stats: dict[str, Any] = json.loads(answer.stdout)
    return stats


def test_workers_see_each_others_writes(server: Server, kind: str) -> None:
    writers = server.ask_all("/sign", WORKERS)
    expected = {f"worker-{pid}": pid for pid in writers}
    readers = server.ask_all("/signatures", WORKERS)
    assert readers.keys() == writers.keys()
    for reader in readers.values():
        assert reader["answer"] == expected
        assert (reader["preloaded by"] != reader["pid"]) is (kind in PRELOADING)


def test_stats_show_the_sum_of_what_the_workers_counted(server: Server, name: str) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = {status for status, _ in pool.map(lambda number: server.ask(f"/work/{number % 7}"), range(400))}
    assert statuses == {200}
    counted: Counter[str] = Counter()
    workers = server.ask_all("/counts", WORKERS)
    for worker in workers.values():
        counted.update(worker["counts"])
    stats = stats_from_another_terminal(name)
    totals = {what: stats[what] for what in ("hits", "misses", "sets", "deletes")}
    assert totals == dict(counted)
    assert counted["hits"] + counted["misses"] == 400 * 50
    attached = {process["pid"]: process for process in stats["attached"]}
    for pid, worker in workers.items():
        assert {what: attached[pid][what] for what in worker["counts"]} == worker["counts"]


def test_a_worker_killed_under_load_leaves_the_others_answering(server: Server, name: str) -> None:
    victim, *survivors = server.ask_all("/work/0", WORKERS)
    answers: Counter[int] = Counter()
    failures: list[Exception] = []
    killed = threading.Event()
    deadline = time.monotonic() + PATIENCE

    def answered_enough() -> bool:
        return killed.is_set() and all(answers[pid] >= 20 for pid in survivors)

    def client(number: int) -> None:
        while not answered_enough() and time.monotonic() < deadline:
            try:
                status, body = server.ask(f"/work/{number % 3}")
            except (OSError, http.client.HTTPException) as error:
                failures.append(error)
                continue
            assert status == 200, server.log
            if killed.is_set():
                answers[json.loads(body)["pid"]] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.ask("/work/0")  # by now the load is on
        os.kill(victim, signal.SIGKILL)
        killed.set()
        for each in clients:
            each.result(PATIENCE * 2)

    assert answered_enough(), f"{answers} of {survivors}, {failures}\n{server.log}"
    assert len(failures) <= CLIENTS, failures  # the requests that the victim had, and no more
    replaced = server.ask_all("/signatures", WORKERS)
    assert victim not in replaced
    assert set(survivors) < replaced.keys()
    stats = stats_from_another_terminal(name)
    assert victim not in {process["pid"] for process in stats["attached"]}
