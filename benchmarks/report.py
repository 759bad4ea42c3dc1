"""Shows what was measured: tables for the terminal and for docs/performance.md, and the file of all figures.

python -m benchmarks --json run.json
python -m benchmarks.report run.json      # fills in docs/performance.md, and draws its plots
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import targets
from benchmarks.loops import clock_cost
from benchmarks.measure import Results
from benchmarks.peers import PEERS, ROOT, Shmcache
from benchmarks.workloads import WORKLOADS

PAGE = ROOT / "docs" / "performance.md"
TAIL = re.compile(r", p[\d.]+$")
COLUMNS = 6  # of figures, in one table

PACKAGES = (
    *("shmcache", "msgpack", "cachetools", "cachebox", "theine", "warp_cache", "lmdb", "UltraDict", "diskcache"),
    *("pylibmc", "pymemcache", "redis", "hiredis", "uWSGI"),
)


@dataclass
class Run:
    """A run: its figures, and of what and on what they are."""

    command: str
    scale: str
    seconds: float
    results: Results
    about: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Run:
        content = json.loads(file.read_text())
        del content["targets"]
        return cls(**{**content, "results": Results(**content["results"])})

    def save(self, file: Path) -> None:
        judged = [
            {"target": words(verdict), "value": verdict.value, "limit": verdict.limit, "met": verdict.met}
            for verdict in self.verdicts()
        ]
        file.write_text(json.dumps({**asdict(self), "targets": judged}, indent=1) + "\n")

    def verdicts(self) -> list[targets.Verdict]:
        return [targets.judge(self.results, target) for target in targets.TARGETS]


# --- the circumstances ----------------------------------------------------------------------------------------------
def about() -> dict[str, str]:
    """Of what commit, by what Python and on what machine."""
    from shmcache import is_compiled

    commit = ""
    if shutil.which("git"):
        git = ("git", "describe", "--always", "--dirty")
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    kernel = ".".join(platform.release().split(".")[:2])
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "commit": commit or "unknown",
        "mode": "compiled" if is_compiled() else "uncompiled",
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, Linux {kernel}",
        "date": time.strftime("%Y-%m-%d"),
        "clock": f"{clock_cost():.0f} ns",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> dict[str, str]:
    """Of the peers and servers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for command in (("redis-server", "--version"), ("memcached", "--version"), ("valgrind", "--version")):
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if number := re.search(r"\d+(?:\.\d+)+", said):
                found[command[0]] = number[0]
    return found


# --- words ----------------------------------------------------------------------------------------------------------
def words(verdict: targets.Verdict) -> str:
    """What a target asks for."""
    target = verdict.target
    whose = "" if target.peer == Shmcache.name else f" of {target.peer}"
    relation = "at most" if target.at_most is not None else "at least"
    if target.times is not None:
        metric, peer = target.times
        same = "" if metric == target.metric else f"'s {metric}"
        limit = f"{verdict.limit:.3g} × {'its own ' + metric if peer == target.peer else peer + same}"
    else:
        plus = f", {target.plus[0]} included" if target.plus else ""
        limit = f"{figure(verdict.limit, 'ns' if target.at_most is not None else '%')}{plus}"
    return f"{target.metric}{whose}: {relation} {limit}"


def came_to(verdict: targets.Verdict) -> str:
    """What it came to, in the terms of the target."""
    if verdict.value is None:
        return "not measured"
    target = verdict.target
    if target.times is not None:
        return f"{verdict.value:.3g} ×"
    return figure(verdict.value, "ns" if target.at_most is not None else "%")


def judged(verdict: targets.Verdict) -> str:
    if verdict.met is None:
        return "-"
    return "met" if verdict.met else f"missed by {100 * verdict.missed_by:.0f} %"


def figure(value: float, unit: str) -> str:
    """A value with three digits and a fitting unit."""
    if unit == "ns":
        for factor, larger in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
            if value >= factor:
                return f"{value / factor:.3g} {larger}"
        return f"{value:.3g} ns"
    if unit == "ops/s":
        for factor, larger in ((1e6, "M/s"), (1e3, "k/s")):
            if value >= factor:
                return f"{value / factor:.3g} {larger}"
        return f"{value:.3g} /s"
    if unit == "%":
        return f"{value:.1f} %"
    if unit in ("ms", "times"):
        return f"{value:.3g} {'×' if unit == 'times' else unit}"
    return f"{value:,.0f}" if unit == "items" else f"{value:,.0f} {unit}"


def facts(peer: str) -> list[str]:
    does = PEERS[peer].does
    flags = (does.shared, does.expires, does.bounded, does.evicts, does.copies)
    return [*("yes" if flag else "no" for flag in flags), does.note]


FACTS = ("shared", "expires", "bounded", "evicts", "copies", "")


# --- tables ---------------------------------------------------------------------------------------------------------
@dataclass
class Grid:
    """One table: the first column names rows."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def grids(results: Results) -> list[Grid]:
    """Two tables for each workload: means and their like, and what the slow ones took."""
    made = []
    for name, workload in WORKLOADS.items():
        metrics = [metric for metric, whose in results.workloads.items() if whose == name]
        slow = [metric for metric in metrics if TAIL.search(metric)]
        for title, chosen in (
            (workload.title, [metric for metric in metrics if metric not in slow]),
            (f"{workload.title}: the slow ones", slow),
        ):
            for first in range(0, len(chosen), COLUMNS):
                made.append(grid(results, title, chosen[first : first + COLUMNS]))
    return made


def grid(results: Results, title: str, metrics: list[str]) -> Grid:
    """Rows are peers, in the order in which they are listed; beside each figure, how many times shmcache's it is."""
    rows = []
    for peer in PEERS:
        medians = [results.median(metric, peer) for metric in metrics]
        if any(value is not None for value in medians):
            rows.append([peer, *(cell(results, metric, peer) for metric in metrics)])
    return Grid(title, ["", *metrics], rows)


def cell(results: Results, metric: str, peer: str) -> str:
    value = results.median(metric, peer)
    if value is None:
        return "-"
    shown = figure(value, results.units[metric])
    own = results.median(metric, Shmcache.name)
    ratio = results.ratio((metric, peer), (metric, Shmcache.name)) if own else None
    if peer == Shmcache.name or ratio is None or results.units[metric] in ("%", "times"):
        return shown
    return f"{shown} ({times(ratio)})"


def times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 1 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def target_grid(run: Run) -> Grid:
    rows = [[words(verdict), came_to(verdict), judged(verdict)] for verdict in run.verdicts()]
    return Grid("Targets", ["target", "measured", ""], rows)


def peer_grid(results: Results) -> Grid:
    taking = {peer for figures in results.figures.values() for peer in figures}
    rows = [[peer, *facts(peer)] for peer in PEERS if peer in taking]
    rows += [[peer, *facts(peer)[:-1], f"not measured: {why}"] for peer, why in results.missing.items()]
    return Grid("What each does", ["", *FACTS], rows)


def instruction_grid(results: Results) -> Grid | None:
    counted = {
        metric: figures[Shmcache.name][0]
        for metric, figures in results.figures.items()
        if results.workloads[metric] == "instructions"
    }
    rows = [[metric, f"{value:,.0f}"] for metric, value in counted.items()]
    return Grid("Instructions per operation, loop included", ["", "instructions"], rows) if rows else None


def all_grids(run: Run) -> list[Grid]:
    counted = instruction_grid(run.results)
    return [*grids(run.results), *([counted] if counted else []), peer_grid(run.results), target_grid(run)]


def show(run: Run, console: Console) -> None:
    """Everything, on the terminal."""
    for each in all_grids(run):
        table = Table(title=each.title, title_justify="left")
        for number, heading in enumerate(each.headings):
            table.add_column(heading, justify="left" if number == 0 or not heading else "right", overflow="fold")
        for row in each.rows:
            style = "bold" if row[0] == Shmcache.name else ""
            colour = {"met": "green", "missed": "red"}.get(row[-1].split(" ")[0], "")
            table.add_row(*row[:-1], f"[{colour}]{row[-1]}[/{colour}]" if colour else row[-1], style=style)
        console.print(table)
    for peer, workload, why in run.results.failed:
        console.print(f"[red]{peer} failed in {workload}[/red]: {why}", highlight=False)
    met = [verdict.met for verdict in run.verdicts()]
    console.print(f"targets: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured")
    console.print(
        f"{run.seconds:.0f} s. A clock reading ({run.about['clock']}) is subtracted from p99 and p99.9; the loop (see "
        f"the empty one) is not. In brackets: times shmcache's. Load when it began: {run.about['load']}."
    )


# --- the page -------------------------------------------------------------------------------------------------------
def markdown(each: Grid) -> str:
    aligned = ["---" if number == 0 or not heading else "---:" for number, heading in enumerate(each.headings)]
    lines = [each.headings, aligned, *each.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def how(run: Run) -> str:
    about = run.about
    named = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return (
        f"`{run.command}`, {about['date']}, at commit `{about['commit']}`, {about['mode']}, Python {about['python']}, "
        f"on {about['machine']}: {run.seconds / 60:.0f} minutes; load at the start {about['load']}. {named}."
    )


def not_measured(results: Results) -> str:
    lines = [f"- {peer}: {why}" for peer, why in results.missing.items()]
    lines += [f"- {peer}, {workload}: {why}" for peer, workload, why in results.failed]
    return "\n".join(lines) or "Nothing."


def fill_in(page: str, name: str, text: str) -> str:
    """Replace what stands between the two marks of this name."""
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def tables(results: Results) -> str:
    counted = instruction_grid(results)
    shown = [*grids(results), *([counted] if counted else [])]
    return "\n\n".join(f"### {each.title}\n\n{markdown(each)}" for each in shown)


@click.command()
@click.argument("file", metavar="RUN", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(file: Path) -> None:
    """Put the figures of RUN, a file of `python -m benchmarks --json`, into docs/performance.md."""
    from benchmarks import plots  # needs matplotlib

    run = Run.load(file)
    page = PAGE.read_text()
    for name, text in {
        "how": how(run),
        "targets": markdown(target_grid(run)),
        "peers": markdown(peer_grid(run.results)),
        "missing": not_measured(run.results),
        "tables": tables(run.results),
    }.items():
        page = fill_in(page, name, text)
    PAGE.write_text(page)
    for drawn in plots.draw(run.results, PAGE.parent / "images"):
        click.echo(drawn)


if __name__ == "__main__":
    main()
