"""Histories of concurrent operations on single keys, with kills: each is one that a single process could have made.

Every worker writes down when each of its operations began and ended, and what it answered. Afterwards a search looks
for an order of them that agrees with those times and with a plain dictionary (Wing and Gong 1993, with the states seen
before remembered, after Lowe 2017). An operation that a kill cut short may have happened at any time since it began, or
never.
"""

from __future__ import annotations

import itertools
import mmap
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shmcache import Cache, is_compiled
from tests.processes import Family, Gate, no_gc
from tests.torture.campaign import Part, Trial

WORKERS = 4
KEYS = 3
OPERATIONS = 600 if is_compiled() else 250  # of each worker in a history
KILLED = 2  # workers a history
NEVER = 1 << 62  # the end of what did not end
LONGEST_WAIT = 0.002 if is_compiled() else 0.05  # seconds until a kill


@dataclass(frozen=True)
class Event:
    """One operation: when it began and ended, ns, what it was and what it answered."""

    began: int
    ended: int
    what: str
    key: int
    argument: int
    answer: Any


# --- the model ------------------------------------------------------------------------------------------------------
# The value under the key is the whole state; None if it is missing.
def step(value: Any, event: Event) -> tuple[bool, Any]:
    """Whether a dictionary with this value could give this answer, and its value afterwards."""
    unknown = event.ended == NEVER
    match event.what:
        case "get":
            return unknown or event.answer == value, value
        case "set":
            return True, event.argument
        case "delete":
            return unknown or event.answer == (value is not None), None
        case "pop":
            return unknown or event.answer == value, None
        case "add":
            return unknown or event.answer == (value is None), event.argument if value is None else value
        case "replace":
            return unknown or event.answer == (value is not None), event.argument if value is not None else None
        case "incr":
            total = (value or 0) + event.argument
            return unknown or event.answer == total, total
        case _:
            raise AssertionError(event)


def is_linearizable(events: list[Event]) -> bool:
    """Whether some order of the events on one key, which begins without it, agrees with all times and answers."""
    events = sorted_by_time(events)
    everything = (1 << len(events)) - 1
    optional = sum(1 << number for number, event in enumerate(events) if event.ended == NEVER)
    seen: set[tuple[int, Any]] = set()
    stack: list[tuple[int, Any]] = [(0, None)]
    while stack:
        done, value = stack.pop()
        if done | optional == everything:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        # An event may come next unless another one that is still to come had ended before it began.
        first_end = NEVER
        number = (~done & (done + 1)).bit_length() - 1  # the first that is still to come
        while number < len(events) and events[number].began <= first_end:
            if not done >> number & 1:
                first_end = min(first_end, events[number].ended)
                fits, after = step(value, events[number])
                if fits:
                    stack.append((done | 1 << number, after))
            number += 1
    return False


# --- the workers ----------------------------------------------------------------------------------------------------
WHATS = ("get", "set", "delete", "pop", "add", "replace", "incr")
CODES = {None: -1, True: -2, False: -3}
ANSWERS = {code: answer for answer, code in CODES.items()}


class Notebook:
    """What the workers write down, in memory that outlives them. A line is six words, the end of the event the last."""

    LINE = 6

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, WORKERS * OPERATIONS * self.LINE * 8)).cast("q")

    def begin(self, worker: int, number: int, what: str, key: int, argument: int) -> None:
        at = (worker * OPERATIONS + number) * self.LINE
        self.memory[at + 1], self.memory[at + 2], self.memory[at + 3] = WHATS.index(what), key, argument
        self.memory[at] = time.monotonic_ns()

    def end(self, worker: int, number: int, answer: Any) -> None:
        at = (worker * OPERATIONS + number) * self.LINE
        self.memory[at + 4] = CODES[answer] if answer is None or isinstance(answer, bool) else answer
        self.memory[at + 5] = time.monotonic_ns()

    def events(self) -> Iterator[Event]:
        for at in range(0, len(self.memory), self.LINE):
            began, what, key, argument, answer, ended = self.memory[at : at + self.LINE]
            if began:
                yield Event(began, ended or NEVER, WHATS[what], key, argument, ANSWERS.get(answer, answer))


def work(cache: Cache, notebook: Notebook, gate: Gate, worker: int, seed: str) -> None:
    rng = random.Random(seed)
    gate.wait()
    for number in range(OPERATIONS):
        what, key, argument = rng.choice(WHATS), rng.randrange(KEYS), rng.randrange(1, 100)
        notebook.begin(worker, number, what, key, argument)
        notebook.end(worker, number, perform(cache, what, key, argument))


def perform(cache: Cache, what: str, key: int, argument: int) -> Any:
    match what:
        case "get":
            return cache.get(key)
        case "set":
            cache.set(key, argument)
            return None
        case "delete":
            return cache.delete(key)
        case "pop":
            return cache.pop(key, None)
        case "add":
            return cache.add(key, argument)
        case "replace":
            return cache.replace(key, argument)
        case _:
            return cache.incr(key, argument, initial=0)


def rounds(trial: Trial) -> Iterator[None]:
    """A round is one history."""
    with no_gc(), trial.cache(max_bytes="1MB", max_entries=16, shards=1) as cache:
        for history in itertools.count():
            cache.clear()
            notebook, gate = Notebook(), Gate()
            with Family() as family:
                workers = [
                    family.fork(work, cache, notebook, gate, worker, f"{trial.seed}-{history}-{worker}")
                    for worker in range(WORKERS)
                ]
                gate.open()
                for victim in trial.rng.sample(workers, KILLED):
                    time.sleep(trial.rng.random() * LONGEST_WAIT)
                    victim.signal(signal.SIGKILL)
                for worker in workers:
                    trial.count("kills", worker.wait() == -signal.SIGKILL)
            events = list(notebook.events())
            for key in range(KEYS):
                of_key = [event for event in events if event.key == key]
                # What is there now, as an event after all others.
                of_key.append(Event(time.monotonic_ns(), NEVER - 1, "get", key, 0, cache.get(key)))
                assert is_linearizable(of_key), "no order explains\n" + "\n".join(map(str, sorted_by_time(of_key)))
            trial.count("events", len(events))
            trial.count("cut short", sum(event.ended == NEVER for event in events))
            trial.count("histories")
            yield


def sorted_by_time(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.began)


PART = Part(
    claim="concurrent operations on a key, with kills among them, are as if they had been made one after the other",
    rounds=rounds,
    short=100 if is_compiled() else 30,
)
