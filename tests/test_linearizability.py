"""The judge of the linearizability part of the torture suite: it passes what can be explained, and nothing else."""

from __future__ import annotations

import pytest

from tests.torture.linearizability import NEVER, Event, is_linearizable


def event(began: int, ended: int, what: str, argument: int = 0, answer: object = None) -> Event:
    return Event(began, ended, what, 0, argument, answer)


@pytest.mark.parametrize(
    ("explains", "events"),
    [
        (True, []),
        (True, [event(1, 2, "set", 5), event(3, 4, "get", answer=5)]),
        (False, [event(1, 2, "set", 5), event(3, 4, "get", answer=None)]),
        (False, [event(1, 2, "set", 5), event(3, 4, "get", answer=6)]),
        # Overlapping: either order will do.
        (True, [event(1, 4, "set", 5), event(2, 3, "get", answer=5)]),
        (True, [event(1, 4, "set", 5), event(2, 3, "get", answer=None)]),
        # Two readers must not see them in different orders.
        (
            False,
            [
                event(1, 9, "set", 5),
                event(1, 9, "set", 6),
                event(2, 3, "get", answer=5),
                event(4, 5, "get", answer=6),
                event(6, 7, "get", answer=5),
            ],
        ),
        # An increment that is lost, and one that is counted twice.
        (False, [event(1, 4, "incr", 1, 1), event(2, 5, "incr", 1, 1)]),
        (True, [event(1, 4, "incr", 1, 2), event(2, 5, "incr", 1, 1)]),
        (False, [event(1, 2, "incr", 1, 2)]),
        # What was cut short happened at some time, or never; not before it began.
        (True, [event(1, NEVER, "set", 5), event(2, 3, "get", answer=None), event(4, 5, "get", answer=5)]),
        (True, [event(1, NEVER, "set", 5), event(2, 3, "get", answer=None), event(4, 5, "get", answer=None)]),
        (False, [event(1, NEVER, "set", 5), event(2, 3, "get", answer=5), event(4, 5, "get", answer=None)]),
        (False, [event(1, 2, "get", answer=5), event(3, NEVER, "set", 5)]),
        # Only one of two gets the entry.
        (False, [event(1, 2, "set", 5), event(3, 6, "pop", answer=5), event(4, 5, "pop", answer=5)]),
        (True, [event(1, 2, "set", 5), event(3, 6, "pop", answer=5), event(4, 5, "pop", answer=None)]),
        (False, [event(1, 4, "add", 5, True), event(2, 5, "add", 6, True)]),
        (True, [event(1, 4, "add", 5, True), event(2, 5, "add", 6, False), event(6, 7, "replace", 8, True)]),
        (False, [event(1, 2, "replace", 5, True)]),
        (False, [event(1, 2, "delete", answer=True)]),
    ],
)
def test_what_can_be_explained(explains: bool, events: list[Event]) -> None:
    assert is_linearizable(events) is explains
