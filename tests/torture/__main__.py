"""The command `python -m tests.torture`: runs the parts of the suite one after the other and says what they came to."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
from pathlib import Path

try:
    import click
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed, which the torture suite needs: pip install -e '.[test]'")
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shmcache import is_compiled
from tests.torture.campaign import NAMES, ROOT, Result, figures, load, run


def describe(result: Result) -> str:
    """What was done, in one cell."""
    if result.skipped:
        return f"not run: {result.skipped}"
    unfinished = load(result.name).sweep and not result.complete
    lines = ["cut short: only a full sweep shows all of the claim"] if unfinished else []
    lines += [", ".join(f"{number:,} {what}" for what, number in sorted(result.counts.items()))]
    return "\n".join(line for line in lines if line)


def durations(results: list[Result]) -> Table:
    """How long things took."""
    shown = Table(title="how long it took, ms")
    shown.add_column("what")
    for heading in ("number", "p50", "p99", "longest"):
        shown.add_column(heading, justify="right")
    for what, samples in sorted(sample for result in results for sample in result.samples.items()):
        shown.add_row(what, f"{len(samples):,}", *figures(samples))
    return shown


def table(results: list[Result], seed: int) -> Table:
    mode = "compiled" if is_compiled() else "uncompiled"
    shown = Table(title=f"torture, seed {seed}, {mode}", caption="seconds and rounds are those of each part")
    for heading, justify in (("part", "left"), ("s", "right"), ("rounds", "right"), ("what", "left")):
        shown.add_column(heading, justify=justify)  # type: ignore[arg-type]
    shown.add_column("failures", justify="right")
    for result in results:
        failures = f"[red]{len(result.failures)}[/red]" if result.failures else "0"
        shown.add_row(result.name, f"{result.seconds:.0f}", f"{result.rounds:,}", describe(result), failures)
    return shown


def circumstances() -> dict[str, str]:
    """Of what, by what and on what the figures are."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": described.stdout.strip() or "unknown",
        "mode": "compiled" if is_compiled() else "uncompiled",
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--for", "minutes", type=click.FloatRange(min=0.01), default=10.0, show_default=True, help="Minutes.")
@click.option("--seed", type=int, help="Make the choices of an earlier run again.  [default: a new one]")
@click.option("--only", type=click.Choice(NAMES), multiple=True, help="Run this part; may be given several times.")
@click.option("--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to a file.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def main(minutes: float, seed: int | None, only: tuple[str, ...], report: Path | None, no_progress: bool) -> None:
    """Try for some minutes to break a cache, in every way the suite knows. Exit status 1 if that worked.

    \b
    Example: python -m tests.torture --for 2 --only faults
    """
    seed = secrets.randbits(32) if seed is None else seed
    console = Console()
    names = list(only) or list(NAMES)
    shares = {name: load(name).share for name in names}
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[done]}"))
    console.print(f"seed {seed}, {minutes:g} minutes")
    with Progress(*columns, console=console, disable=no_progress, redirect_stdout=False) as progress:
        for name in names:
            seconds = minutes * 60 * shares[name] / sum(shares.values())
            task = progress.add_task(f"{name:12}", total=seconds, done="")

            def show(result: Result, task: object = task) -> None:
                counts = ", ".join(f"{number:,} {what}" for what, number in result.counts.items())
                progress.update(task, completed=result.seconds, done=counts)  # type: ignore[arg-type]

            result = run(name, seed, seconds=seconds, progress=show)
            progress.update(task, completed=seconds)
            results.append(result)
            for failure in result.failures:
                console.print(f"[red]{name}[/red]: {escape(failure)}", highlight=False)
    if any(result.samples for result in results):
        console.print(durations(results))
    console.print(table(results, seed))
    if report is not None:
        chosen = "".join(f" --only {name}" for name in only)
        command = f"python -m tests.torture --for {minutes:g} --seed {seed}{chosen}"
        everything = {"command": command, **circumstances(), "parts": [vars(each) for each in results]}
        report.write_text(json.dumps(everything))
    sys.exit(1 if any(result.failures for result in results) else 0)


if __name__ == "__main__":
    main()
