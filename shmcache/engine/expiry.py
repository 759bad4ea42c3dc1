"""When entries expire: the timer wheel that finds expired entries without looking at the others.

A hashed timing wheel (Varghese and Lauck, SOSP 1987, scheme 6): an entry with an expiry is in the list of its tick,
a tick being about a second, modulo the number of lists. A hand walks the ticks up to now; what it meets and has not
expired belongs to a later round and stays. The time is always an argument. All of it needs the shard's lock.
"""

from __future__ import annotations

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.primitives import *
else:
    from shmcache.engine.layout import *
    from shmcache.engine.primitives import *

__all__ = ["Wheel"]


@cython.final
@cython.cclass
class Wheel:
    """The lists of one shard's entries that have an expiry."""

    def __init__(self, words: memoryview, header: int, log: int, lists: int, slots: int, count: int) -> None:
        self.words = words
        self.header = header
        self.log = log
        self.lists = lists
        self.slots = slots
        self.count = count

    def on_insert(self, slot: cython.ulonglong) -> None:
        """Put the slot, whose expiry is set and not 0, into its list."""
        head: cython.ulonglong = self.list_of(load(self.words, self.at(slot) + E_EXPIRY) >> WHEEL_SHIFT)
        first: cython.ulonglong = load(self.words, head)
        neighbour: cython.ulonglong
        logged_store(self.words, self.log, self.at(slot) + E_TIMER, pack(first, 0))
        if first:
            neighbour = self.at(first - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), slot + 1))
        logged_store(self.words, self.log, head, slot + 1)

    def on_remove(self, slot: cython.ulonglong) -> None:
        """Take the slot, whose expiry still is the one it was put in with, out of its list."""
        links: cython.ulonglong = load(self.words, self.at(slot) + E_TIMER)  # next in the upper half, previous below
        before: cython.ulonglong = low(links)
        after: cython.ulonglong = high(links)
        neighbour: cython.ulonglong
        if before:
            neighbour = self.at(before - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_high(load(self.words, neighbour), after))
        else:
            neighbour = self.list_of(load(self.words, self.at(slot) + E_EXPIRY) >> WHEEL_SHIFT)
            logged_store(self.words, self.log, neighbour, after)
        if after:
            neighbour = self.at(after - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), before))
        if load(self.words, self.header + S_CURSOR) == slot + 1:
            logged_store(self.words, self.log, self.header + S_CURSOR, after)

    def next_expired(self, now: cython.ulonglong, budget: cython.ulonglong) -> int:
        """An expired slot plus 1, or 0 when none was found within `budget` entries looked at."""
        slot: cython.ulonglong = self.next_due(now, budget)
        return slot if slot else self.scan_current(now, budget, 0)

    def next_due(self, now: cython.ulonglong, budget: cython.ulonglong) -> int:
        """The same for the ticks that are over.

        The hand only remembers how far it got; losing its place costs a second look, so it is not logged.
        """
        today: cython.ulonglong = now >> WHEEL_SHIFT
        hand: cython.ulonglong = load(self.words, self.header + S_HAND)
        cursor: cython.ulonglong = load(self.words, self.header + S_CURSOR)
        expiry: cython.ulonglong
        if hand + WHEEL_LISTS < today or hand > today:  # once round sees every list
            hand = wrap(today - WHEEL_LISTS) if today > WHEEL_LISTS else 0
            cursor = 0
        if not cursor:
            cursor = load(self.words, self.list_of(hand))
        while hand < today:
            while cursor and budget:
                budget -= 1
                expiry = load(self.words, self.at(cursor - 1) + E_EXPIRY)
                if expiry and expiry <= now:
                    store(self.words, self.header + S_HAND, hand)
                    store(self.words, self.header + S_CURSOR, cursor)
                    return cursor
                cursor = high(load(self.words, self.at(cursor - 1) + E_TIMER))
            if cursor:
                break
            hand += 1
            cursor = load(self.words, self.list_of(hand))
        store(self.words, self.header + S_HAND, hand)
        if hand < today:
            store(self.words, self.header + S_CURSOR, cursor)
            return 0
        store(self.words, self.header + S_CURSOR, 0)  # this list still grows at its head
        return 0

    def scan_current(self, now: cython.ulonglong, budget: cython.ulonglong, start: cython.ulonglong) -> int:
        """The same for the tick that is not over yet, from slot `start - 1` of its list on, or from its head if 0."""
        slot: cython.ulonglong = start if start else load(self.words, self.list_of(now >> WHEEL_SHIFT))
        expiry: cython.ulonglong
        while slot and budget:
            budget -= 1
            expiry = load(self.words, self.at(slot - 1) + E_EXPIRY)
            if expiry and expiry <= now:
                return slot
            slot = high(load(self.words, self.at(slot - 1) + E_TIMER))
        return 0

    def at(self, slot: cython.ulonglong) -> int:
        return self.slots + slot * SLOT_WORDS

    def list_of(self, tick: cython.ulonglong) -> int:
        return self.lists + (tick & (WHEEL_LISTS - 1))
