"""Which entry goes first: everything that orders entries for eviction lives in this file.

A policy has four operations, `on_insert`, `on_hit`, `on_remove` and `victim`. It knows slots and their order words; it
knows nothing of keys, blocks or locks. All of them need the shard's lock but `is_stale`.
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

__all__ = ["Lru"]


@cython.final
@cython.cclass
class Lru:
    """Least recently used first: a doubly linked list, the most recent at its head.

    A slot keeps the tick at which it was last moved. In a small cache, whose order is exact, every move is a tick, and
    a hit moves its entry at once. In a large one only insertions tick, and a hit moves its entry when as many as an
    eighth of the slots have come since: nothing is evicted but for what comes, so time passes no faster than that. Of
    the hits of a cache that misses rarely few write anything then, and none where nothing comes.
    """

    def __init__(self, words: memoryview, header: int, log: int, slots_at: int, slots: int) -> None:
        self.words = words
        self.header = header
        self.log = log
        self.slots_at = slots_at
        self.slots = slots
        self.limit = 0 if slots <= EXACT_ORDER_SLOTS else slots >> LAZY_ORDER_SHIFT

    def on_insert(self, slot: cython.ulonglong) -> None:
        self.tick()
        self.link_front(slot)

    def is_stale(self, slot: cython.ulonglong) -> bool:
        """Whether a hit moves the slot to the front; may be asked without the lock of one that was just read."""
        tick: cython.ulonglong = load(self.words, self.header + S_TICK)
        return low(wrap(tick - high(load(self.words, self.slots_at + slot * SLOT_WORDS + E_PLACE)))) > self.limit

    def on_hit(self, slot: cython.ulonglong) -> None:
        if self.is_stale(slot):
            self.unlink(slot)
            if self.limit == 0:
                self.tick()
            self.link_front(slot)

    def on_remove(self, slot: cython.ulonglong) -> None:
        self.unlink(slot)

    def victim(self) -> int:
        """The slot to evict, plus 1; 0 when there is none."""
        return high(load(self.words, self.header + S_ORDER))

    # --- the list ---------------------------------------------------------------------------------------------------
    def at(self, slot: cython.ulonglong) -> int:
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def tick(self) -> None:
        tick: cython.ulonglong = low(load(self.words, self.header + S_TICK) + 1)
        logged_store(self.words, self.log, self.header + S_TICK, tick)

    def link_front(self, slot: cython.ulonglong) -> None:
        ends: cython.ulonglong = load(self.words, self.header + S_ORDER)  # tail in the upper half, head in the lower
        head: cython.ulonglong = low(ends)
        neighbour: cython.ulonglong
        tick: cython.ulonglong = low(load(self.words, self.header + S_TICK))
        logged_store(self.words, self.log, self.at(slot) + E_ORDER, pack(head, 0))
        if head:
            neighbour = self.at(head - 1) + E_ORDER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), slot + 1))
            ends = with_low(ends, slot + 1)
        else:
            ends = pack(slot + 1, slot + 1)
        logged_store(self.words, self.log, self.header + S_ORDER, ends)
        place: cython.ulonglong = load(self.words, self.at(slot) + E_PLACE)
        logged_store(self.words, self.log, self.at(slot) + E_PLACE, with_high(place, tick))

    def unlink(self, slot: cython.ulonglong) -> None:
        links: cython.ulonglong = load(self.words, self.at(slot) + E_ORDER)  # next in the upper half, previous below
        before: cython.ulonglong = low(links)
        after: cython.ulonglong = high(links)
        ends: cython.ulonglong = load(self.words, self.header + S_ORDER)
        neighbour: cython.ulonglong
        if before:
            neighbour = self.at(before - 1) + E_ORDER
            logged_store(self.words, self.log, neighbour, with_high(load(self.words, neighbour), after))
        else:
            ends = with_low(ends, after)
        if after:
            neighbour = self.at(after - 1) + E_ORDER
            logged_store(self.words, self.log, neighbour, with_low(load(self.words, neighbour), before))
        else:
            ends = with_high(ends, before)
        if not before or not after:
            logged_store(self.words, self.log, self.header + S_ORDER, ends)
