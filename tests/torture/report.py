"""Turns the figures of a run into what docs/reliability.md shows: a table, and a plot of how long others were held up.

python -m tests.torture --for 60 --json run.json
python -m tests.torture.report run.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from tests.torture.campaign import ROOT, load, percentile

PAGE = ROOT / "docs" / "reliability.md"
PLOT = ROOT / "docs" / "images" / "recovery.svg"
GREY = "#808080"  # legible on white and on black


def table(run: dict[str, Any], claims: dict[str, str]) -> str:
    """The Markdown table of what was tried."""
    lines = ["| Part | What it shows | What was done | Failures |", "|---|---|---|---:|"]
    for part in run["parts"]:
        done = "; ".join(f"{number:,} {what}" for what, number in sorted(part["counts"].items()))
        done = f"not run: {part['skipped']}" if part["skipped"] else f"{done}, in {part['seconds']:.0f} s"
        lines.append(f"| `{part['name']}` | {claims[part['name']]} | {done} | {len(part['failures'])} |")
    return "\n".join(lines)


def durations(run: dict[str, Any]) -> str:
    """The Markdown table of how long things took, ms."""
    lines = ["| What | Number | p50, ms | p99, ms | longest, ms |", "|---|---:|---:|---:|---:|"]
    for part in run["parts"]:
        for what, samples in sorted(part["samples"].items()):
            p50, p99, longest = (1e3 * percentile(samples, share) for share in (0.5, 0.99, 1))
            lines.append(f"| {what} | {len(samples):,} | {p50:.2f} | {p99:.2f} | {longest:.2f} |")
    return "\n".join(lines)


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
                ordered = [1e3 * each for each in sorted(samples)]
                shares = [100 * (number + 1) / len(ordered) for number in range(len(ordered))]
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


@click.command()
@click.argument("run", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(run: Path) -> None:
    """Put the figures of RUN, a file that `python -m tests.torture --json` wrote, into docs/reliability.md."""
    figures = json.loads(run.read_text())
    claims = {part["name"]: load(part["name"]).claim for part in figures["parts"]}
    how = (
        f"`python -m tests.torture --for {figures['minutes']:g} --seed {figures['seed']}`, at commit "
        f"`{figures['commit']}`, {figures['mode']}, Python {figures['python']}, on {figures['machine']}."
    )
    page = PAGE.read_text()
    for name, text in (("how", how), ("table", table(figures, claims)), ("durations", durations(figures))):
        page = fill_in(page, name, text)
    PAGE.write_text(page)
    plot(figures, PLOT)


if __name__ == "__main__":
    main()
