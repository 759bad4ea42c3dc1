"""What `ls`, `stats` and `doctor` say: figures and findings as people read them, and who the attached processes are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from shmcache import segment
from shmcache.cli.doctor import Finding
from shmcache.cli.text import show_age, show_ratio, show_size, table
from shmcache.engine.bytelock import holders
from shmcache.engine.store import is_compiled
from shmcache.stats import ProcessStats, Stats

__all__ = [
    "RATES",
    "finding_lines",
    "identify",
    "list_json",
    "list_lines",
    "live_json",
    "live_line",
    "live_rates",
    "lock_holders",
    "stats_json",
    "stats_lines",
    "without_self",
]

RATES = ("hits", "misses", "sets", "deletes", "evictions", "expirations")
CLOCK_SLACK = 2.0  # seconds by which the start of a process and the wall clock may disagree


def without_self(stats: Stats) -> Stats:
    """The figures with this process taken out of the attached ones: somebody who only looks does not count.

    A process of another pid namespace may have the same pid; this one attached last.
    """
    mine = max(
        (each for each in stats.attached if each.pid == os.getpid()), key=lambda each: each.attached, default=None
    )
    others = [each for each in stats.attached if each is not mine]
    return replace(stats, processes=len(others), attached=others)


# --- ls -------------------------------------------------------------------------------------------------------------
def list_lines(found: Iterable[tuple[str, Stats | str]]) -> Iterator[str]:
    """A table of caches. `found` has the figures of each, or why there are none."""
    rows = []
    for name, stats in found:
        if isinstance(stats, str):
            rows.append([name, *"-----"])
        else:
            ratio = show_ratio(stats.hits, stats.misses)
            size, used = show_size(stats.max_bytes), show_size(stats.bytes_used)
            rows.append([name, size, used, f"{stats.entries:,}", ratio, str(stats.processes)])
    if rows:
        yield from table(("NAME", "SIZE", "USED", "ENTRIES", "HIT RATIO", "PROCESSES"), rows, "<>>>>>")


def list_json(name: str, stats: Stats | str) -> dict[str, Any]:
    """One cache of the list, for JSON."""
    if isinstance(stats, str):
        return {"name": name, "error": stats}
    fields = ("name", "max_bytes", "bytes_used", "entries", "max_entries", "hits", "misses", "hit_ratio", "processes")
    return {field: getattr(stats, field) for field in fields}


# --- stats ----------------------------------------------------------------------------------------------------------
def stats_lines(stats: Stats, width: int | None = None) -> Iterator[str]:
    """All about one cache; lines of processes are cut at `width`."""
    age = max(time.time() - stats.created, 0.001)
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stats.created))
    expiry = "no expiry" if stats.default_ttl is None else f"entries live {show_age(stats.default_ttl)}"
    shards = "1 shard" if stats.shards == 1 else f"{stats.shards} shards"
    yield f"{stats.name}: {show_size(stats.max_bytes)}, {shards}, {stats.eviction}, {expiry} by default, {engine()}"
    yield f"created {created}, {show_age(age)} ago"
    yield ""
    rows = [[name, f"{getattr(stats, name):,}", show_rate(getattr(stats, name) / age)] for name in RATES]
    rows.insert(2, ["hit ratio", show_ratio(stats.hits, stats.misses), ""])
    yield from table(("", "TOTAL", "AVERAGE PER SECOND"), rows, "<>>")
    yield ""
    wait = f", {1000 * stats.lock_wait_seconds / stats.lock_waits:.3g} ms on average" if stats.lock_waits else ""
    peak = f"peak {show_size(stats.peak_bytes)}, {show_size(stats.bytes_free)} free"
    yield from table(
        ("entries", f"{stats.entries:,} of at most {stats.max_entries:,} (peak {stats.peak_entries:,})"),
        (
            ("memory", f"{show_size(stats.bytes_used)} in keys and values ({peak})"),
            ("lock waits", f"{stats.lock_waits:,}{wait}"),
            ("read retries", f"{stats.read_retries:,}"),
            ("recoveries", f"{stats.recoveries:,}"),
            ("processes", f"{stats.processes:,}"),
        ),
        "<<",
    )
    if stats.attached:
        yield ""
        now = time.time()
        holders = lock_holders(stats.name)
        processes = [
            [
                str(each.pid),
                show_age(max(round(now - each.attached), 0)),
                *(f"{count:,}" for count in (each.hits, each.misses, each.sets, each.deletes)),
                str(identify(each, holders)),
            ]
            for each in stats.attached
        ]
        header = ("PID", "ATTACHED", "HITS", "MISSES", "SETS", "DELETES", "COMMAND")
        yield from (line[:width] for line in table(header, processes, ">>>>>><"))


def stats_json(stats: Stats) -> dict[str, Any]:
    """All about one cache, for JSON."""
    age = max(time.time() - stats.created, 0.001)
    answer = stats.as_dict()
    answer["compiled"] = is_compiled()
    answer["rates"] = {name: getattr(stats, name) / age for name in RATES}
    holders = lock_holders(stats.name)
    for process, each in zip(answer["attached"], stats.attached, strict=True):
        owner = identify(each, holders)
        process.update(command=owner.command, note=owner.note)
    return answer


def engine() -> str:
    """Which engine runs, in words."""
    return "compiled" if is_compiled() else "uncompiled"


# --- stats --watch --------------------------------------------------------------------------------------------------
def live_rates(before: Stats, after: Stats, seconds: float) -> dict[str, float]:
    """Counts per second between two moments; a counter that is just being moved to the totals never runs backwards."""
    return {name: max(getattr(after, name) - getattr(before, name), 0) / seconds for name in RATES}


def live_line(stats: Stats | None, rates: dict[str, float]) -> str:
    """A line of `--watch`; its header without figures."""
    cells = ["time", *(f"{name}/s" for name in RATES), "hit ratio", "entries", "used", "processes"]
    if stats is not None:
        cells = [time.strftime("%H:%M:%S"), *map(show_rate, rates.values()), show_ratio(rates["hits"], rates["misses"])]
        cells += [f"{stats.entries:,}", show_size(stats.bytes_used), str(stats.processes)]
    return " ".join(
        f"{cell:>{width}}" for cell, width in zip(cells, (8, 9, 9, 9, 9, 11, 13, 9, 10, 10, 9), strict=True)
    )


def live_json(stats: Stats, rates: dict[str, float]) -> dict[str, Any]:
    """A line of `--watch`, for JSON."""
    answer: dict[str, Any] = {"time": time.time(), "rates": rates}
    return answer | {name: getattr(stats, name) for name in ("entries", "bytes_used", "processes")}


def show_rate(rate: float) -> str:
    """A number per second, with a decimal where it is small."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


# --- doctor ---------------------------------------------------------------------------------------------------------
def finding_lines(finding: Finding) -> Iterator[str]:
    """A finding, and on a line of its own what to do about it."""
    yield f"{finding.level:<7}  {finding.about}: {finding.found}"
    if finding.do:
        yield f"{'':<7}  -> {finding.do}"


# --- processes ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Owner:
    """Who an attached process is: its command line, or why it is not known."""

    command: str | None
    note: str | None = None

    def __str__(self) -> str:
        return self.command or f"({self.note})"


def identify(process: ProcessStats, holders: set[int] | None) -> Owner:
    """The command line of an attached process. `holders` is what `lock_holders` gave for its cache.

    It is alive: the kernel said so. But its pid is its own view of itself, and in this pid namespace it may be nobody's
    or somebody else's: one who started after it attached, or who holds no lock in the cache's lock file.
    """
    import psutil

    stranger = Owner(None, "of another pid namespace; here the pid is another process's")
    try:
        found = psutil.Process(process.pid)
        if found.create_time() > process.attached + CLOCK_SLACK:
            return stranger
        if holders is not None and process.pid not in holders:
            return stranger
        words = " ".join(found.cmdline())
    except (psutil.NoSuchProcess, OverflowError):  # or what the segment says is no pid at all
        return Owner(None, "just ended, or of another pid namespace")
    except psutil.AccessDenied:
        return Owner(None, "not ours to look at")
    return Owner("".join(each if each.isprintable() else " " for each in words))


def lock_holders(name: str) -> set[int] | None:
    """The pids, as seen from here, that hold locks in the lock file of a cache; None where the kernel does not tell."""
    found = holders(segment.lock_path(name))
    return None if found is None else set(found.values())
