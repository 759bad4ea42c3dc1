"""What a cache tells about itself: the figures of the segment, gathered into plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from shmcache.attachment import Attachment
from shmcache.engine import layout
from shmcache.engine.primitives import load

__all__ = ["EntryInfo", "ProcessStats", "Stats", "collect"]


@dataclass(frozen=True)
class ProcessStats:
    """One attached process: its `pid` as it sees itself, `attached` in seconds since the epoch, counts since then."""

    pid: int
    attached: float
    hits: int
    misses: int
    sets: int
    deletes: int


@dataclass(frozen=True)
class Stats:
    """The figures of a cache at one moment. Counts are totals of all processes since creation; sizes are in bytes.

    `hit_ratio` is the share (0 to 1) of reads that found something, None before the first. `attached` is in
    the order of pids. `bytes_used` is what keys and values take of `max_bytes`; `bytes_free` what blocks are free for
    more. The peaks are sums of the shards' peaks, so the true ones are at most these.
    `recoveries` counts locks taken over from dead processes. `lock_wait_seconds` is summed over all waits.
    """

    name: str
    hits: int
    misses: int
    hit_ratio: float | None
    sets: int
    deletes: int
    evictions: int
    expirations: int
    entries: int
    max_entries: int
    bytes_used: int
    bytes_free: int
    max_bytes: int
    peak_entries: int
    peak_bytes: int
    recoveries: int
    lock_waits: int
    lock_wait_seconds: float
    read_retries: int
    shards: int
    eviction: str
    default_ttl: float | None
    created: float  # seconds since the epoch
    processes: int
    attached: list[ProcessStats] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EntryInfo:
    """One entry: encoded sizes in bytes, `ttl` in seconds (None: no expiry), the `version` that `gets` gives."""

    key: Any
    ttl: float | None
    version: int
    key_bytes: int
    value_bytes: int
    shard: int

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def collect(attachment: Attachment) -> Stats:
    """Read the figures, without a lock: each is right, though not all are of the same instant."""
    words = attachment.words
    geometry = attachment.geometry
    counts = [attachment.registry.counter(number) for number in range(layout.COUNTERS)]
    attached = sorted((_process(attachment, line) for line in attachment.registry.live_lines()), key=_pid)
    hits, misses = counts[layout.C_HITS], counts[layout.C_MISSES]
    ttl = load(words, layout.H_DEFAULT_TTL)

    def total(field_word: int) -> int:
        return sum(load(words, geometry.region(shard).header + field_word) for shard in range(geometry.shards))

    return Stats(
        name=attachment.name,
        hits=hits,
        misses=misses,
        hit_ratio=hits / (hits + misses) if hits + misses else None,
        sets=counts[layout.C_SETS],
        deletes=counts[layout.C_DELETES],
        evictions=total(layout.S_EVICTIONS),
        expirations=total(layout.S_EXPIRATIONS),
        entries=total(layout.S_ENTRIES),
        max_entries=geometry.max_entries,
        bytes_used=total(layout.S_USED_BYTES),
        bytes_free=(total(layout.S_FREE_BLOCKS) + _limbo_blocks(attachment)) * layout.BLOCK_BYTES,
        max_bytes=geometry.max_bytes,
        peak_entries=total(layout.S_PEAK_ENTRIES),
        peak_bytes=total(layout.S_PEAK_BYTES),
        recoveries=counts[layout.C_RECOVERIES],
        lock_waits=counts[layout.C_LOCK_WAITS],
        lock_wait_seconds=counts[layout.C_LOCK_WAIT_NS] / 1e9,
        read_retries=counts[layout.C_READ_RETRIES],
        shards=geometry.shards,
        eviction=geometry.eviction,
        default_ttl=ttl / 1e9 if ttl else None,
        created=load(words, layout.H_CREATED) / 1e9,
        processes=len(attached),
        attached=attached,
    )


def _limbo_blocks(attachment: Attachment) -> int:
    """The blocks in limbo, of all shards: free as well, to whoever counts. A walk beside writers, so not exact."""
    words, geometry, found = attachment.words, attachment.geometry, 0
    for region in map(geometry.region, range(geometry.shards)):
        blocks = 0
        run = load(words, region.header + layout.S_LIMBO)
        while 0 < run <= geometry.blocks and blocks < geometry.blocks:
            head = load(words, region.blocks + (run - 1) * layout.BLOCK_WORDS)
            blocks += max(1, head >> 32 & layout.RUN_LENGTH_MASK)
            run = head & 0xFFFF_FFFF
        found += min(blocks, geometry.blocks)
    return found


def _pid(process: ProcessStats) -> int:
    return process.pid


def _process(attachment: Attachment, line: int) -> ProcessStats:
    at = attachment.registry.line(line)
    words = attachment.words
    counters = at + layout.P_COUNTERS
    return ProcessStats(
        pid=load(words, at + layout.P_PID),
        attached=load(words, at + layout.P_ATTACHED) / 1e9,
        hits=load(words, counters + layout.C_HITS),
        misses=load(words, counters + layout.C_MISSES),
        sets=load(words, counters + layout.C_SETS),
        deletes=load(words, counters + layout.C_DELETES),
    )
