"""The benchmarks measure what they say: statements that do what they stand for, ratios, verdicts, and the budget."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks import data, instructions, model, report, targets
from benchmarks.loops import Bench, chunked, quantile
from benchmarks.measure import PREFIX, Results, plan
from benchmarks.peers import PEERS, Does, Peer, Store
from benchmarks.workloads import FULL, QUICK, WORKLOADS
from shmcache import is_compiled
from tests.serving import ROOT

PATIENCE = 120.0


def left_behind(pid: int) -> list[str]:
    """What a run of the benchmarks left in memory: others may run at the same time."""
    return [file.name for file in Path("/dev/shm").glob(f"*{PREFIX}-{pid}-*")]


@pytest.fixture
def bench(request: pytest.FixtureRequest, name: str) -> Iterator[Bench]:
    peer, kind = request.param
    if reason := PEERS[peer].why_missing():
        pytest.skip(reason)
    # Not pytest's directory: the address of a unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="shm") as place:
        opened = Bench(PEERS[peer], Store(name, Path(place), kind, entries=100))
        try:
            yield opened
        finally:
            opened.close()


# --- what is timed --------------------------------------------------------------------------------------------------
IN_PROCESS = [
    *("shmcache", "dict", "dict+msgpack", "functools.lru_cache", "cachetools.TTLCache", "cachetools.LRUCache"),
    *("cachebox.TTLCache", "cachebox.LRUCache", "theine", "warp_cache memory", "warp_cache shared", "lmdb"),
    *("diskcache.Cache", "diskcache.FanoutCache", "Redis", "memcached pylibmc", "memcached pymemcache"),
]


@pytest.mark.parametrize("bench", [(peer, kind) for peer in IN_PROCESS for kind in ("str 20", "1 KiB")], indirect=True)
def test_statements_do_what_they_stand_for(bench: Bench) -> None:
    there, absent = bench.to_keys(data.keys(3)), bench.to_keys(data.keys(2, "none"))
    bench.fill(there)
    assert [bench.once("get", key) for key in there] == [bench.value] * 3
    if bench.can("set"):
        assert bench.once("miss" if bench.can("miss") else "get", absent[0]) is None
    if bench.can("get_many"):
        found = bench.once("get_many", [*there, absent[0]])
        assert [found.get(key) for key in (*there, absent[0])] == [bench.value] * 3 + [None]
    assert bench.peer.entries() == 3
    if bench.can("delete"):
        bench.tight("delete", there[:1])
        assert bench.once("get", there[0]) is None
        bench.tight("delete", there[:1])  # no error where there is nothing
    if bench.can("expire"):
        bench.tight("expire", there)
        assert bench.once("get", there[0]) == bench.value


@pytest.mark.parametrize("bench", [("shmcache", "str 20"), ("dict", "str 20")], indirect=True)
def test_forked_processes_work_together(bench: Bench) -> None:
    keys = data.keys(4)

    def work(forked: Bench, number: int) -> int:
        forked.fill(keys[number : number + 1])
        return number

    assert bench.together(4, work) == [0, 1, 2, 3]
    shared = bench.peer.does.shared
    assert [bench.once("get", key) for key in keys] == [bench.value if shared else None] * 4


@pytest.mark.parametrize("bench", [("dict", "str 20")], indirect=True)
def test_times_are_of_each_operation(bench: Bench) -> None:
    keys = data.keys(50)
    assert bench.tight("set", keys) > 0
    times = bench.clocked("get", keys)
    assert len(times) == 50
    assert times == sorted(times)
    assert 1 <= bench.fits("get", keys, 1e-9) <= 50


def test_keys_and_values_are_the_same_in_every_run() -> None:
    keys = data.keys(1000)
    drawn = data.zipf(keys, 10_000)
    assert drawn == data.zipf(keys, 10_000)
    commonest, next_to_it = sorted((drawn.count(key) for key in set(drawn)), reverse=True)[:2]
    assert commonest > next_to_it > 10_000 / 20
    assert {len(key) for key in data.long_keys(10)} == {50}
    operations = [operation for operation, _ in data.mix(keys, 10_000, 1)]
    assert [operations.count(kind) / 10_000 for kind in (0, 1, 2)] == pytest.approx([0.8, 0.15, 0.05], abs=0.01)


def test_quantiles_and_chunks() -> None:
    assert [quantile(range(1000), share) for share in (0.0, 0.5, 0.999, 1.0)] == [0, 500, 999, 999]
    assert chunked("abcde", 2) == ["ab", "cd", "e"]


# --- what is planned ------------------------------------------------------------------------------------------------
def test_a_peer_that_is_not_there_is_named_with_the_reason() -> None:
    class Absent(Peer):
        name = "absent"
        does = Does()
        modules: ClassVar = ("no_such_module",)

    class Server(Peer):
        name = "server"
        does = Does()
        program = "no-such-program"

    assert Absent.why_missing() == "Python module no_such_module is not installed"
    assert Server.why_missing() == "no-such-program is not installed"


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=lambda scale: scale.name)
def test_every_peer_takes_part_and_every_workload_has_shmcache(scale: object) -> None:
    assert scale in (QUICK, FULL)
    steps = plan(QUICK if scale is QUICK else FULL, WORKLOADS, PEERS)
    assert {peer for step in steps for peer in step.peers} == PEERS.keys()
    assert {step.workload for step in steps if "shmcache" in step.peers} == WORKLOADS.keys()


# --- what is made of it ---------------------------------------------------------------------------------------------
def results(**rounds: list[float]) -> Results:
    """Of one metric, by peer."""
    made = Results()
    for peer, values in rounds.items():
        for value in values:
            made.note("get", peer, "metric", "ns", value)
    return made


def test_a_ratio_is_taken_within_rounds() -> None:
    drifting = results(shmcache=[10, 100, 1000], other=[20, 200, 1000])
    assert drifting.ratio(("metric", "shmcache"), ("metric", "other")) == 0.5
    assert drifting.median("metric", "shmcache") == 100
    assert drifting.ratio(("metric", "shmcache"), ("metric", "absent")) is None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (targets.Target("metric", at_most=0.5, times=("metric", "other")), "met"),
        (targets.Target("metric", at_most=0.4, times=("metric", "other")), "missed by 25 %"),
        (targets.Target("metric", at_least=0.4, times=("metric", "other")), "met"),
        (targets.Target("metric", at_least=1.0, times=("metric", "other")), "missed by 50 %"),
        (targets.Target("metric", at_most=100), "met"),
        (targets.Target("metric", at_most=50), "missed by 100 %"),
        (targets.Target("metric", at_most=1, plus=("metric", "other")), "met"),
        (targets.Target("metric", at_most=1, plus=("metric", "absent")), "-"),
        (targets.Target("other metric", at_most=1), "-"),
    ],
)
def test_targets_are_met_or_missed(target: targets.Target, said: str) -> None:
    verdict = targets.judge(results(shmcache=[100], other=[200]), target)
    assert report.judged(verdict) == said
    assert target.metric in report.words(verdict)


def test_figures_have_fitting_units() -> None:
    assert [report.figure(value, "ns") for value in (12.34, 1234, 1.234e6, 2e9)] == [
        "12.3 ns",
        "1.23 µs",
        "1.23 ms",
        "2 s",
    ]
    assert report.figure(1_234_567, "ops/s") == "1.23 M/s"
    assert report.figure(1234, "items") == "1,234"


def test_the_page_has_a_place_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    page = report.PAGE.read_text()
    for name in ("how", "targets", "peers", "missing", "tables"):
        assert f"\nfilled in {name}\n" in report.fill_in(page, name, f"filled in {name}")
    shown = report.tables(results(shmcache=[100], dict=[50]))
    assert "| dict | 50 ns (0.5×) |" in shown


def test_a_run_ends_with_figures_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    options = ["--quick", "--only", "get", "--peers", "shmcache,dict", "--no-progress", "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said + errors
    assert "targets: " in said
    run = report.Run.load(file)
    assert run.results.failed == []
    for metric in ("get hit, str 20", "get hit, 1 MiB", "get miss, p99.9"):
        for peer in ("shmcache", "dict"):
            assert len(run.results.figures[metric][peer]) == QUICK.rounds
    assert len(json.loads(file.read_text())["targets"]) == len(targets.TARGETS)
    assert left_behind(process.pid) == []


# --- the model of more cores ------------------------------------------------------------------------------------------
def test_the_model_of_one_core_is_its_costs() -> None:
    costs = model.Costs(get=200, outside=100, inside=300, changes=0.5)
    assert model.operations(costs, 1, 1, 20_000) == pytest.approx(1000 / 300, rel=0.02)
    assert model.operations(model.Costs(get=200, changes=0), 32, 1, 20_000) == pytest.approx(32 * 5, rel=0.02)


def test_in_the_model_a_lock_is_the_limit_and_shards_move_it() -> None:
    costs = model.Costs(changes=1.0)
    most = 1000 / (costs.inside + costs.lines * costs.transfer)
    assert model.operations(costs, 32, 1, 20_000) == pytest.approx(most, rel=0.02)
    assert 2 * most < model.operations(costs, 32, 4, 20_000) < 4 * most
    [few, many] = model.table(costs, cores=(2, 8), shards=(1, 4))
    assert [len(few), few[0], many[0]] == [3, "2", "8"]


# --- the budget -----------------------------------------------------------------------------------------------------
def test_an_operation_takes_no_more_instructions_than_its_budget() -> None:
    if reason := instructions.why_missing():
        pytest.skip(reason)
    if not is_compiled():
        pytest.skip("the budget is of the compiled engine")
    budget = instructions.budget()
    if budget is None:
        pytest.skip(f"there is no budget for Python {instructions.version()}")
    counts = instructions.count()
    assert counts.keys() == budget.keys()
    over = {name: round(counts[name]) for name in counts if counts[name] > budget[name] * (1 + instructions.TOLERANCE)}
    assert over == {}, f"more than {budget}"
