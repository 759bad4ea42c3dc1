"""`shmcache demo`: clients ask a real gunicorn for slow pages, and people see which worker answered from what."""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import random
import secrets
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import click

from shmcache.cache import Cache
from shmcache.cli import report, text
from shmcache.demo.server import DemoError, Server, require_gunicorn, serve
from shmcache.demo.site import MISS, OWN, SHARED
from shmcache.stats import Stats

__all__ = ["run"]

PAGES = 100
CLIENTS = 8
FIRST_REQUESTS = 16  # one after the other, a line each
GRACE_SECONDS = 2.0  # beyond the time asked for, until every worker has served what another one made
COLOURS = {MISS: "red", OWN: "cyan", SHARED: "green"}
LETTERS = {MISS: "M", OWN: "o", SHARED: "S"}


@dataclass(frozen=True)
class Answer:
    """One answered request: by which worker, from what, and how long the client waited."""

    path: str
    worker: int
    maker: int
    source: str
    seconds: float


@dataclass
class Tally:
    """All answers so far, by worker and source."""

    workers: tuple[int, ...]
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    waits: dict[str, list[float]] = field(default_factory=lambda: {MISS: [], OWN: [], SHARED: []})
    paths: set[str] = field(default_factory=set)
    last: dict[int, deque[str]] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        self.counts[answer.worker, answer.source] += 1
        self.waits[answer.source].append(answer.seconds)
        self.paths.add(answer.path)
        self.last.setdefault(answer.worker, deque(maxlen=200)).append(answer.source)

    def of(self, source: str) -> int:
        return len(self.waits[source])

    @property
    def requests(self) -> int:
        return sum(map(len, self.waits.values()))

    def everybody_shared(self) -> bool:
        """Whether each worker has served a page that another one made."""
        return all(self.counts[worker, SHARED] for worker in self.workers)


def run(seconds: float, workers: int, as_json: bool) -> None:
    """Run the demo; its cache and its processes are gone afterwards, whatever ends it."""
    display = Display(as_json)
    name = f"demo-{secrets.token_hex(4)}"
    # Ephemeral: should this process be killed, the cache goes with the last worker.
    try:
        require_gunicorn()
        with _signals_as_exceptions(), Cache(name, max_bytes="16MB", ephemeral=True) as cache:
            try:
                with serve(cache, workers) as server:
                    display.begin(server, name)
                    tally = Tally(server.workers)
                    _first_requests(server, tally, display)
                    took = _storm(server, tally, display, seconds)
                    stats = report.without_self(cache.stats())
                    display.end(tally, stats, took)
            finally:
                cache.unlink()
    except DemoError as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack, as Ctrl-C does; and once it is unwinding, no further signal disturbs it."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def unwind(number: int, _frame: object) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = [signal.signal(each, unwind) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


# --- the clients ----------------------------------------------------------------------------------------------------
def _ask(port: int, path: str) -> Answer:
    """Request one page."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DemoError(f"gunicorn did not answer {path} ({error or type(error).__name__})") from error
    finally:
        connection.close()
    if response.status != 200:
        raise DemoError(f"gunicorn answered {path} with {response.status} {response.reason}")
    said = {name: response.headers[f"X-{name}"] for name in ("Worker", "Maker", "Source")}
    return Answer(path, int(said["Worker"]), int(said["Maker"]), said["Source"], time.perf_counter() - began)


def _first_requests(server: Server, tally: Tally, display: Display) -> None:
    """A few requests one after the other, for pages of their own, so that each can be followed."""
    for number in range(FIRST_REQUESTS):
        answer = _ask(server.port, f"/start/{number % 3}")
        tally.add(answer)
        display.answer(answer)


def _storm(server: Server, tally: Tally, display: Display, seconds: float) -> float:
    """Concurrent clients that ask for pages, some of them far more often than others; for how long they did."""
    answers: queue.SimpleQueue[Answer | DemoError] = queue.SimpleQueue()
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers.put(_ask(server.port, f"/page/{int(PAGES * random.random() ** 3)}"))
            except DemoError as error:
                answers.put(error)
                return

    clients = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    began = time.monotonic()
    display.storm(tally)
    for each in clients:
        each.start()
    try:
        elapsed = 0.0
        while elapsed < seconds or (elapsed < seconds + GRACE_SECONDS and not tally.everybody_shared()):
            time.sleep(0.1)
            _drain(answers, tally)
            elapsed = time.monotonic() - began
            display.progress(tally, elapsed)
    finally:
        stop.set()
        for each in clients:
            each.join(2)
    took = time.monotonic() - began
    _drain(answers, tally)
    display.progress(tally, took, last=True)
    return took


def _drain(answers: queue.SimpleQueue[Answer | DemoError], tally: Tally) -> None:
    while not answers.empty():
        answer = answers.get()
        if isinstance(answer, DemoError):
            raise answer
        tally.add(answer)


# --- what people see ------------------------------------------------------------------------------------------------
class Display:
    """Prints while the demo runs: a table that stays in place on a terminal, plain lines otherwise, JSON at the end."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        width = shutil.get_terminal_size().columns
        self.room = width - 67  # what the table leaves for the last answers
        can_move = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and self.room > 0
        self.terminal = can_move and not as_json
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self.drawn = 0
        self.before = 0  # requests at the last progress that was printed
        self.printed = 0.0

    def say(self, line: str = "") -> None:
        if not self.as_json:
            click.echo(line)
            sys.stdout.flush()

    def paint(self, line: str, source: str) -> str:
        return click.style(line, fg=COLOURS[source]) if self.colour else line

    def begin(self, server: Server, name: str) -> None:
        self.say(f"gunicorn (pid {server.pid}) on 127.0.0.1:{server.port}, workers {_list(server.workers)}")
        self.say(f"their cache: {name} (look at it from another terminal: shmcache stats {name} --watch 1)")
        self.say()
        self.say("One request after the other:")

    def answer(self, answer: Answer) -> None:
        what = {
            MISS: "miss: had to make the page",
            OWN: "hit: a page of its own",
            SHARED: f"hit: a page that worker {answer.maker} made",
        }[answer.source]
        line = f"worker {answer.worker}  {answer.path}  {1000 * answer.seconds:5.1f} ms  "
        self.say("  " + line + self.paint(what, answer.source))

    def storm(self, tally: Tally) -> None:
        self.before = tally.requests
        self.say()
        self.say(f"{CLIENTS} clients at once:")

    def progress(self, tally: Tally, elapsed: float, last: bool = False) -> None:
        """What each worker answered so far."""
        if self.as_json or not (self.terminal or elapsed - self.printed >= (0.5 if last else 1)):
            return
        rate = (tally.requests - self.before) / max(elapsed, 0.001)
        title = f"{elapsed:5.1f} s  {tally.requests:,} requests, {rate:,.0f} a second"
        rows = [
            [str(worker), *(self.paint(f"{tally.counts[worker, source]:,}", source) for source in COLOURS)]
            for worker in tally.workers
        ]
        if self.terminal:
            lines = self._table(tally, rows)
            click.echo(f"\x1b[{self.drawn}F\x1b[J" * bool(self.drawn) + "\n".join([title, *lines]))
            self.drawn = len(lines) + 1
        else:
            click.echo(title)
            for worker, misses, own, shared in rows:
                click.echo(f"  worker {worker}: {misses} misses, {own} hits of its own, {shared} of other workers'")
        self.printed = elapsed
        sys.stdout.flush()

    def _table(self, tally: Tally, rows: list[list[str]]) -> list[str]:
        """The table for a terminal, with as many of the last answers of each worker as there is room for."""
        for worker, row in zip(tally.workers, rows, strict=True):
            recent = list(tally.last.get(worker, ()))[-self.room :]
            row.append("".join(self.paint(LETTERS[source], source) for source in recent))
        header = ["WORKER", "MISSES (M)", "OWN HITS (o)", "HITS OF OTHERS' PAGES (S)", "LAST"[: self.room]]
        return text.table(header, rows, ">>>><")

    def end(self, tally: Tally, stats: Stats, seconds: float) -> None:
        """The figures of the cache, and what they come to."""
        if self.as_json:
            click.echo(text.as_json(_summary(tally, stats, seconds, self.before)))
            return
        self.say()
        for line in report.stats_lines(stats, shutil.get_terminal_size().columns if self.terminal else None):
            self.say(line)
        self.say()
        for line in _conclusion(tally, seconds, self.before):
            self.say(line)


def _list(workers: tuple[int, ...]) -> str:
    return ", ".join(map(str, workers))


def _median_ms(waits: list[float]) -> float | None:
    return 1000 * statistics.median(waits) if waits else None


def _conclusion(tally: Tally, seconds: float, before: int) -> Iterator[str]:
    """A few sentences."""
    hits = tally.of(OWN) + tally.of(SHARED)
    hit, miss = _median_ms(tally.waits[OWN] + tally.waits[SHARED]), _median_ms(tally.waits[MISS])
    yield f"{(tally.requests - before) / seconds:,.0f} requests a second, by {CLIENTS} clients."
    if hit and miss:
        yield f"A hit took {hit:.1f} ms and a miss {miss:.1f} ms, HTTP included (medians)."
    made, pages, workers = tally.of(MISS), len(tally.paths), len(tally.workers)
    twice = f", {made - pages} of them by two workers at once" if made > pages else ""
    yield f"{tally.requests:,} requests, {pages} pages, and a page was made {made} times{twice}."
    yield f"With a cache in each worker it would have been up to {pages * workers}."
    yield f"{tally.of(SHARED):,} of {hits:,} hits were pages that another worker had made:"
    for worker in tally.workers:
        yield f"  worker {worker} served {tally.counts[worker, SHARED]:,} of them"


def _summary(tally: Tally, stats: Stats, seconds: float, before: int) -> dict[str, Any]:
    """The same, for scripts."""
    sources = (MISS, OWN, SHARED)
    return {
        "requests": tally.requests,
        "requests_per_second": (tally.requests - before) / seconds,
        "pages": len(tally.paths),
        **{source: tally.of(source) for source in sources},
        "hit_ms": _median_ms(tally.waits[OWN] + tally.waits[SHARED]),
        "miss_ms": _median_ms(tally.waits[MISS]),
        "workers": [
            {"pid": worker, **{source: tally.counts[worker, source] for source in sources}} for worker in tally.workers
        ],
        "stats": report.stats_json(stats),
    }
