"""Every file of examples/ is run as its head says, with the real server."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from shmcache import Cache
from tests.serving import PATIENCE, ROOT, gunicorn, serve, uwsgi

EXAMPLES = ROOT / "examples"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=PATIENCE * 4)


def test_no_example_is_forgotten() -> None:
    tested = {
        "attach.py",
        "gunicorn.conf.py",
        "gunicorn_app.py",
        "pool.py",
        "quick_timing.py",
        "uwsgi.ini",
        "uwsgi_app.py",
    }
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


def test_gunicorn_workers_share_a_page_and_another_process_looks_at_it(name: str) -> None:
    with serve(gunicorn("-c", "gunicorn.conf.py", "gunicorn_app:app"), name, EXAMPLES) as server:
        assert server.ask("/nothing")[0] == 404
        made_by = set()
        deadline_for_another_worker = 1000
        for _ in range(deadline_for_another_worker):
            status, body = server.ask("/report/7")
            assert status == 200
            match = re.fullmatch(r"worker (\d+) answers with what worker (\d+) made\n", body)
            assert match, body
            made_by.add(match[2])
            if match[1] != match[2]:
                break
        else:
            pytest.fail("no worker answered with what another made")
        assert len(made_by) == 1

        looked = run("attach.py", name)
        assert (looked.returncode, looked.stderr) == (0, "")
        assert f"{name}: 1 entries" in looked.stdout
        assert "('memoize', 'report', 7) = {'report': 7, 'made by': " in looked.stdout


def test_uwsgi_workers_enforce_one_limit(name: str) -> None:
    with serve(uwsgi("--ini", "uwsgi.ini"), name, EXAMPLES) as server:
        with Cache.attach(name) as cache:
            cache.clear()  # the question whether the server was up counted already
        answers = [server.ask("/") for _ in range(15)]
        server.wait_until_all_workers_wait()
    assert [status for status, _ in answers] == [200] * 10 + [429] * 5
    for number, (_, body) in enumerate(answers[:10], 1):
        assert body.startswith(f"request {number} of 10, answered by worker ")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_computes_little_more_than_once(method: str) -> None:
    done = run("-W", "error", "pool.py", method)
    assert (done.returncode, done.stderr) == (0, "")
    match = re.match(r"2000 tasks, 50 customers, (\d+) computations\n(\d+) hits and (\d+) misses", done.stdout)
    assert match, done.stdout
    computations, hits, misses = map(int, match.groups())
    assert 50 <= computations <= 4 * 50  # that several workers compute the same one at the same time is no error
    assert misses == computations
    assert hits == 2000 - misses


def test_a_pool_of_an_unknown_kind_is_wrong_usage() -> None:
    done = run("pool.py", "thread")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: pool.py ")
    assert "Traceback" not in done.stderr


def test_attaching_to_nothing_is_one_clear_line(name: str) -> None:
    looked = run("attach.py", name)
    assert looked.returncode == 1
    assert looked.stdout == ""
    assert looked.stderr.count("\n") == 1
    assert f"there is no cache named '{name}'" in looked.stderr


def test_quick_timing_prints_a_table() -> None:
    timed = run("quick_timing.py", "--rounds", "1", "--number", "1000")
    assert (timed.returncode, timed.stderr) == (0, "")
    assert re.search(r"^\| shmcache +\| +[\d,.]+ +\|", timed.stdout, re.MULTILINE), timed.stdout
