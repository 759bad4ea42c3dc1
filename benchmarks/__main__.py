"""The command `python -m benchmarks`: measures shmcache and its peers, and says which targets were met.

The one command that reproduces the figures, from a fresh clone (it takes about half an hour; `--quick` two minutes):

    python -m venv .venv && .venv/bin/pip install -e '.[bench]' && .venv/bin/python -m benchmarks --json run.json

Servers and what needs a compiler are peers if they are there (Debian: `apt-get install redis-server memcached
libmemcached-dev valgrind`, and `.venv/bin/pip install -e '.[bench-compiled]'`); else the output says that they are not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

try:
    import click
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed, which the benchmarks need: pip install -e '.[bench]'")
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import instructions, measure, report
from benchmarks.peers import PEERS, Shmcache
from benchmarks.workloads import FULL, QUICK, WORKLOADS

INSTRUCTIONS = "instructions"
NAMES = (*WORKLOADS, INSTRUCTIONS)


def chosen_peers(_: click.Context, __: click.Parameter, text: str | None) -> list[str]:
    """By name, or by the start of it: "warp" is both of warp_cache's."""
    if text is None:
        return list(PEERS)
    chosen = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        exact = [name for name in PEERS if name.lower() == word.lower()]
        found = exact or [name for name in PEERS if name.lower().startswith(word.lower())]
        if not found:
            raise click.BadParameter(f"{word!r} is none of: {', '.join(PEERS)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def in_a_directory(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """Refused now rather than after the measurement."""
    if file is not None and not file.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {file.absolute().parent}")
    return file


def terminate(_number: int, _frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does, with everything stopped and removed."""
    raise KeyboardInterrupt


def count_instructions(results: measure.Results) -> None:
    if reason := instructions.why_missing():
        results.failed.append((Shmcache.name, INSTRUCTIONS, reason))
        return
    try:
        counts = instructions.count()
    except RuntimeError as error:
        results.failed.append((Shmcache.name, INSTRUCTIONS, str(error)))
        return
    for name, count in counts.items():
        results.note(INSTRUCTIONS, Shmcache.name, f"instructions, {name}", "instructions", count)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Two minutes: smaller stores, fewer rounds, noisier figures.")
@click.option("--only", type=click.Choice(NAMES), multiple=True, help="Run this workload; may be given several times.")
@click.option("--peers", callback=chosen_peers, metavar="A,B", help="Only these peers; the start of a name will do.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_directory,
    help="Write all figures to a file.",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    callback=in_a_directory,
    help="Draw the plots into a directory.",
)
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def main(
    quick: bool, only: tuple[str, ...], peers: list[str], file: Path | None, plots: Path | None, no_progress: bool
) -> None:
    """Measure shmcache beside its peers, in one run.

    Exit status 1 if shmcache itself failed; a missed target is no error.

    \b
    Example: python -m benchmarks --quick --only get --peers shmcache,dict,lmdb
    """
    signal.signal(signal.SIGTERM, terminate)
    # What pip installed is compiled to bytecode; a clone that may not be would be compiled anew in each process.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    began, console = time.monotonic(), Console()
    if not console.is_terminal:
        console.width = 160
    scale = QUICK if quick else FULL
    results = measure.Results(missing={peer: why for peer in peers if (why := PEERS[peer].why_missing())})
    names = list(only) or list(NAMES)
    present = [peer for peer in peers if peer not in results.missing]
    steps = measure.plan(scale, [name for name in names if name in WORKLOADS], present)
    chosen = [*(f"--only {name}" for name in only), *([] if peers == list(PEERS) else [f"--peers '{','.join(peers)}'"])]
    command = " ".join(["python -m benchmarks", *(["--quick"] if quick else []), *chosen])
    run = report.Run(command, scale.name, 0.0, results, report.about(), report.versions())
    counting = INSTRUCTIONS in names and Shmcache.name in present

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=no_progress) as progress:
        total = sum(step.rounds for step in steps) + counting
        task = progress.add_task("", total=total)

        def done(step: measure.Step) -> None:
            progress.update(task, advance=1, description=step.workload)

        measure.run(steps, scale, results, done)
        if counting:
            progress.update(task, description=INSTRUCTIONS)
            count_instructions(results)
            progress.update(task, advance=1)
    run.seconds = time.monotonic() - began
    report.show(run, console)
    if file is not None:
        run.save(file)
    if plots is not None:
        from benchmarks import plots as drawing  # needs matplotlib

        drawing.draw(results, plots)
    broken = [workload for peer, workload, _ in results.failed if peer == Shmcache.name and workload != INSTRUCTIONS]
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
