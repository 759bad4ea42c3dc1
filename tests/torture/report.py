"""Turns the figures of a run into what docs/reliability.md and the README show: tables, and a plot of recoveries.

python -m tests.torture --for 60 --json run.json
python -m tests.torture.report run.json

Parts that were run by themselves (`--only`), each with a file, make one page together, which names the commit of each.
What several runs of a part did adds up; how long things took is shown of the first of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import click

from tests.torture.campaign import NAMES, ROOT, figures, load, percentile

PAGE = ROOT / "docs" / "reliability.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "images" / "recovery.svg"
GREY = "#808080"  # legible on white and on black
POINTS = 200  # of a curve

# What the README says of a part, with its counts; {deaths of lock holders} is a count of that name.
HEADLINES = {
    "kills": "**{kills}** workers killed by `kill -9` at any moment, {deaths of lock holders} of which had a lock",
    "instructions": "**{states left by a death}** states that a death between two machine instructions leaves",
    "double_deaths": "**{double deaths}** times the next process died while it recovered what the first had left",
    "interrupts": "**{interrupts}** signal handlers that raised in the middle of an operation",
    "torn_reads": "**{reads}** reads beside writers at full speed, {reads that met a writer in the midst} of which "
    "met one in the midst of its change",
}


def table(run: dict[str, Any], claims: dict[str, str]) -> str:
    """The Markdown table of what was tried."""
    lines = ["| Part | What it shows | What was done | Failures |", "|---|---|---|---:|"]
    for part in run["parts"]:
        done = "; ".join(f"{number:,} {what}" for what, number in sorted(part["counts"].items()))
        done = f"not run: {part['skipped']}" if part["skipped"] else f"{done}, in {part['seconds']:.0f} s"
        kind = load(part["name"])
        if kind.sweep and not part["complete"]:
            done = f"cut short: {done}"
        where = " (on the sources)" if kind.on_sources else ""
        lines.append(f"| `{part['name']}`{where} | {claims[part['name']]} | {done} | {len(part['failures'])} |")
    return "\n".join(lines)


def durations(run: dict[str, Any]) -> str:
    """The Markdown table of how long things took, ms."""
    lines = ["| What | Number | p50, ms | p99, ms | longest, ms |", "|---|---:|---:|---:|---:|"]
    for part in run["parts"]:
        for what, samples in sorted(part["samples"].items()):
            lines.append(f"| {what} | {len(samples):,} | {' | '.join(figures(samples))} |")
    return "\n".join(lines)


def headlines(run: dict[str, Any]) -> str:
    """The list of the README."""
    lines = []
    for part in run["parts"]:
        if part["name"] in HEADLINES and not part["skipped"]:
            counts = defaultdict(lambda: "0", {what: f"{number:,}" for what, number in part["counts"].items()})
            lines.append("- " + HEADLINES[part["name"]].format_map(counts))
    failures = sum(len(part["failures"]) for part in run["parts"])
    said = "no hang, no lock lost, no wrong or torn value, no stored entry lost"
    return "\n".join([*lines, "", f"Failures: {failures or f'none: {said}'}."])


def plot(run: dict[str, Any], file: Path) -> None:
    """Draw the share of deaths of lock holders that others got over within a time, as SVG."""
    import matplotlib  # an extra: only who makes the page needs it

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shmcache"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for part in run["parts"]:
        for what, samples in sorted(part["samples"].items()):
            if what.startswith("recovery"):
                shares = [100 * number / POINTS for number in range(1, POINTS + 1)]
                ordered = [1e3 * percentile(samples, share / 100) for share in shares]
                axes.step(ordered, shares, where="post", label=what.partition(", ")[2])
    axes.set_xscale("log")
    axes.set_xlabel("ms from the death of a lock's holder to the next write by another process", color=GREY)
    axes.set_ylabel("% of deaths", color=GREY)
    axes.tick_params(colors=GREY, which="both")
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, labelcolor=GREY)
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def fill_in(page: str, name: str, text: str) -> str:
    """Replace what stands between the two marks of this name."""
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return between.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of several runs as one."""
    if len({(run["mode"], run["python"], run["machine"]) for run in runs}) > 1:
        raise click.UsageError("these are runs of several modes, Pythons or machines: a page is about one")
    parts: dict[str, dict[str, Any]] = {}
    for run in runs:
        for part in run["parts"]:
            known = parts.get(part["name"])
            parts[part["name"]] = part if known is None else added(known, part)
    return {**runs[-1], "parts": [parts[name] for name in NAMES if name in parts]}


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two runs of a part as one; `samples` are those of the first: during the other the machine may have done more."""
    counts = Counter(one["counts"])
    counts.update({what: number for what, number in other["counts"].items() if what != "Pythons"})
    both = {what: one[what] + other[what] for what in ("rounds", "seconds", "failures")}
    return {**one, **both, "counts": dict(counts), "complete": one["complete"] or other["complete"]}


def how(runs: list[dict[str, Any]]) -> str:
    """By which commands, of what and on what."""
    last = runs[-1]
    lines = [f"- `{run['command']}` at commit `{run['commit']}`" for run in runs]
    minutes = sum(part["seconds"] for run in runs for part in run["parts"]) / 60
    where = f"All {last['mode']}, Python {last['python']}, on {last['machine']}: {minutes:.0f} minutes."
    return "\n".join([*lines, "", where])


@click.command()
@click.argument("files", metavar="RUN...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Put the figures of each RUN, a file of `python -m tests.torture --json`, into the pages that show them."""
    runs = [json.loads(file.read_text()) for file in files]
    run = merged(runs)
    claims = {part["name"]: load(part["name"]).claim for part in run["parts"]}
    texts = {
        "how": how(runs),
        "table": table(run, claims),
        "durations": durations(run),
        "headlines": headlines(run),
    }
    for page in (PAGE, README):
        text = page.read_text()
        for name, filling in texts.items():
            text = fill_in(text, name, filling)
        page.write_text(text)
    plot(run, PLOT)


if __name__ == "__main__":
    main()
