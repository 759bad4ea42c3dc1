"""When entries expire: the timer wheel that finds expired entries without looking at the others.

A hierarchical timing wheel (Varghese and Lauck, SOSP 1987, scheme 7). A tick is about a second, and the hand stands at
the earliest tick whose entries may not all be gone. An entry that expires in the hand's block of 32 ticks is in the
list of its tick; one of a later block is in the list of that block, and so on upwards: four levels of 32 lists reach
twelve days ahead, and what lies beyond waits in the list that is last of all. When the hand comes to a block, the
block's list is dealt out to the level below, so an entry is moved at most three times in those twelve days. The first
of a list has the number of the list in place of a previous neighbour.

The time is always an argument. All of it needs the shard's lock.
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

    def __init__(self, words: memoryview, header: int, log: int, lists: int, slots_at: int, slots: int) -> None:
        self.words = words
        self.header = header
        self.log = log
        self.lists = lists
        self.slots_at = slots_at
        self.slots = slots

    def on_insert(self, slot: cython.ulonglong) -> None:
        """Put the slot, whose expiry is set and not 0, into its list."""
        number: cython.ulonglong = self.number_of(load(self.words, self.at(slot) + E_EXPIRY) >> WHEEL_SHIFT)
        first: cython.ulonglong = load(self.words, self.lists + number)
        neighbour: cython.ulonglong
        logged_store(self.words, self.log, self.at(slot) + E_TIMER, pack(first, WHEEL_FIRST | number))
        if first:
            neighbour = self.at(first - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), slot + 1))
        logged_store(self.words, self.log, self.lists + number, slot + 1)

    def on_remove(self, slot: cython.ulonglong) -> None:
        """Take the slot out of its list."""
        links: cython.ulonglong = load(self.words, self.at(slot) + E_TIMER)  # next in the upper half, previous below
        before: cython.ulonglong = low(links)
        after: cython.ulonglong = high(links)
        neighbour: cython.ulonglong
        if before & WHEEL_FIRST:
            logged_store(self.words, self.log, self.lists + (before & (WHEEL_LISTS - 1)), after)
        else:
            neighbour = self.at(before - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_high(load(self.words, neighbour), after))
        if after:
            neighbour = self.at(after - 1) + E_TIMER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), before))

    def next_expired(self, now: cython.ulonglong, budget: cython.ulonglong) -> int:
        """An expired slot plus 1, or 0 when none was found within `budget` live entries looked at."""
        slot: cython.ulonglong = self.next_due(now, budget)
        return slot if slot else self.scan_current(now, budget, 0)

    def next_due(self, now: cython.ulonglong, budget: cython.ulonglong) -> int:
        """The same for the ticks that are over, dealing out on the way what is not due yet."""
        today: cython.ulonglong = now >> WHEEL_SHIFT
        hand: cython.ulonglong = load(self.words, self.header + S_HAND)
        level: cython.ulonglong = WHEEL_LEVELS - 1
        slot: cython.ulonglong
        expiry: cython.ulonglong
        if hand == 0 or hand > today + WHEEL_AHEAD:  # a new wheel, or nonsense
            hand = today
            store(self.words, self.header + S_HAND, hand)
        while hand <= today:  # a writer that waited for the lock may be late
            slot = 0
            while level and not slot:
                slot = load(self.words, self.list_of(level, hand))
                level -= not slot
            if not slot and hand < today:
                slot = load(self.words, self.list_of(0, hand))
            if slot:
                expiry = load(self.words, self.at(slot - 1) + E_EXPIRY)
                if expiry and expiry <= now:
                    return slot
                if not expiry or not budget:
                    return 0
                budget -= 1
                self.on_remove(slot - 1)
                self.on_insert(slot - 1)
                store_release(self.words, self.log + L_USED, 0)
                continue
            if hand == today:
                return 0
            hand = min(today, hand + self.empty_span(hand))
            store(self.words, self.header + S_HAND, hand)
            if not hand & WHEEL_MASK:  # a new block
                level = WHEEL_LEVELS - 1
        return 0

    def empty_span(self, hand: cython.ulonglong) -> int:
        """How many ticks from this one on, whose own lists are empty, the hand can pass at once."""
        level: cython.ulonglong = 0
        number: cython.ulonglong
        while level < WHEEL_LEVELS and hand & ((1 << (level + 1) * WHEEL_BITS) - 1) == 0:  # whole blocks of the level
            for number in range(level << WHEEL_BITS, (level + 1) << WHEEL_BITS):
                if load(self.words, self.lists + number):
                    return 1 << level * WHEEL_BITS
            level += 1
        return 1 << level * WHEEL_BITS

    def scan_current(self, now: cython.ulonglong, budget: cython.ulonglong, start: cython.ulonglong) -> int:
        """The same for the tick that is not over yet, from slot `start - 1` of its list on, or from its head if 0."""
        slot: cython.ulonglong = start if start else load(self.words, self.list_of(0, now >> WHEEL_SHIFT))
        expiry: cython.ulonglong
        while slot and budget:
            budget -= 1
            expiry = load(self.words, self.at(slot - 1) + E_EXPIRY)
            if expiry and expiry <= now:
                return slot
            slot = high(load(self.words, self.at(slot - 1) + E_TIMER))
        return 0

    def at(self, slot: cython.ulonglong) -> int:
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def list_of(self, level: cython.ulonglong, tick: cython.ulonglong) -> int:
        """The word of the list that a level has for a tick."""
        return self.lists + (level << WHEEL_BITS | (tick >> level * WHEEL_BITS & WHEEL_MASK))

    def number_of(self, tick: cython.ulonglong) -> int:
        """The number of the list that an entry of this tick belongs to, seen from where the hand is."""
        hand: cython.ulonglong = load(self.words, self.header + S_HAND)
        level: cython.ulonglong = 0
        if tick < hand:
            tick = hand  # due already
        while level < WHEEL_LEVELS - 1 and tick >> (level + 1) * WHEEL_BITS != hand >> (level + 1) * WHEEL_BITS:
            level += 1
        tick >>= level * WHEEL_BITS
        hand >>= level * WHEEL_BITS
        if tick - hand > WHEEL_MASK:
            tick = hand + WHEEL_MASK  # beyond the last level: to be looked at again then
        return level << WHEEL_BITS | (tick & WHEEL_MASK)
