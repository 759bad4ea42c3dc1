"""The plots of a run, as SVG, each for a light page and for a dark one. The same figures give the same files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.measure import Results
from benchmarks.peers import PEERS, Shmcache, ShmcachePure
from benchmarks.workloads.capacity import growth_metric
from benchmarks.workloads.throughput import Mix

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "shmcache"  # instead of chance
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text

from matplotlib import pyplot  # noqa: E402


class Colours(NamedTuple):
    own: str
    shared: str
    private: str
    text: str


THEMES = {
    "light": Colours("#0b7a4b", "#5b7fb5", "#b8b8b8", "#24292f"),
    "dark": Colours("#3fd18b", "#7fa6e0", "#6a6f76", "#d0d7de"),
}


def draw(results: Results, place: Path) -> list[Path]:
    """Draw what there are figures for; the files."""
    place.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, plot in PLOTS.items():
        for theme, colours in THEMES.items():
            with pyplot.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), colours.text)):
                figure, axes = pyplot.subplots(figsize=(7, 4))
                if plot(results, axes, colours):
                    axes.tick_params(colors=colours.text, which="both")
                    axes.spines[["top", "right"]].set_visible(False)
                    figure.tight_layout()
                    file = place / f"{name}-{theme}.svg"
                    figure.savefig(file, transparent=True, metadata={"Date": None})
                    drawn.append(file)
                pyplot.close(figure)
    return drawn


def colour(peer: str, colours: Colours) -> str:
    if peer == Shmcache.name:
        return colours.own
    return colours.shared if PEERS[peer].does.shared else colours.private


def medians(results: Results, metric: str) -> dict[str, float]:
    """By peer, without yardsticks, in order of size."""
    found = {
        peer: value
        for peer in results.figures.get(metric, {})
        if not PEERS[peer].yardstick and peer != ShmcachePure.name and (value := results.median(metric, peer))
    }
    return dict(sorted(found.items(), key=lambda each: each[1]))


def bars(metric: str, label: str) -> Callable[[Results, Any, Colours], bool]:
    """A bar a peer, the quickest on top."""

    def plot(results: Results, axes: Any, colours: Colours) -> bool:
        found = medians(results, metric)
        if not found:
            return False
        places = range(len(found))
        drawn = axes.barh(places, list(found.values()), color=[colour(peer, colours) for peer in found])
        axes.bar_label(drawn, [short(value) for value in found.values()], padding=3, fontsize=8)
        axes.set_yticks(places, [f"{peer} (shared)" if PEERS[peer].does.shared else peer for peer in found], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        return True

    return plot


def short(ns: float) -> str:
    return f"{ns:.0f} ns" if ns < 1000 else f"{ns / 1000:.3g} µs"


def lines(metrics: dict[int, str], x: str, y: str, scale: float = 1) -> Callable[[Results, Any, Colours], bool]:
    """A line a peer, over numbers."""

    def plot(results: Results, axes: Any, colours: Colours) -> bool:
        ends = {}
        for number, peer in enumerate(PEERS):
            points = {at: scale * value for at, metric in metrics.items() if (value := results.median(metric, peer))}
            if len(points) < 2:
                continue
            own = peer == Shmcache.name
            axes.plot(
                list(points),
                list(points.values()),
                color=colour(peer, colours),
                linestyle="-" if own else ("-", "--", ":", "-.")[number % 4],
                linewidth=2.5 if own else 1.2,
                marker="o",
                markersize=3,
            )
            ends[peer] = points[max(points)]
        axes.set_xscale("log", base=2 if max(metrics) <= 64 else 10)
        axes.set_yscale("log")
        axes.set_xticks(list(metrics), [f"{at:,}" for at in metrics])
        axes.minorticks_off()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        label(axes, ends, colours)
        return bool(ends)

    return plot


def label(axes: Any, ends: dict[str, float], colours: Colours) -> None:
    """Write the peers beside the ends of their lines, as far apart as they can be read."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    lowest = 0.0
    for peer, end in sorted(ends.items(), key=lambda each: each[1]):
        place = max(lowest, (math.log(end) - low) / (high - low))
        axes.text(1.01, place, peer, transform=axes.transAxes, fontsize=8, va="center", color=colour(peer, colours))
        lowest = place + 0.045


PLOTS: dict[str, Callable[[Results, Any, Colours], bool]] = {
    "get": bars("get hit, str 20", "ns to get a str of 20 characters, one process"),
    "get-tail": bars("get hit, str 20, p99.9", "ns that one in a thousand of these exceeds"),
    "mix": lines(
        {count: Mix.metric(count) for count in Mix.processes},
        *("processes on the cores there are", "million operations a second, 80/15/5 of 1 KiB"),
        1e-6,
    ),
    "growth": lines(
        {10**power: growth_metric(10**power) for power in range(3, 8)}, "entries", "ns to get one by chance"
    ),
}
