"""Which slot holds a key: everything that links slots into buckets, or into the list of free slots, lives in this file.

A bucket is a link word, and so is a slot's place in the chain. A link carries a tag of the hash it leads to, so that a
slot of another key is hardly ever touched. The walk along a chain is done by who compares keys: `reader.py` without the
lock, `shard.py` with it.
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

__all__ = ["Table"]


@cython.final
@cython.cclass
class Table:
    """The buckets and free slots of one shard. Everything that changes something needs the shard's lock."""

    def __init__(self, words: memoryview, header: int, log: int, buckets: int, slots_at: int, slots: int) -> None:
        self.words = words
        self.header = header
        self.log = log
        self.buckets = buckets
        self.slots_at = slots_at
        self.slots = slots

    def at(self, slot: cython.ulonglong) -> int:
        """The word index of a slot."""
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def bucket_of(self, hash: cython.ulonglong) -> int:
        """The word index of the bucket: the lower half of the hash scaled to the number of buckets, one per slot."""
        return self.buckets + (low(hash) * self.slots >> 32)

    def link(self, slot: cython.ulonglong, hash: cython.ulonglong) -> None:
        """Put a slot at the head of its bucket's chain."""
        bucket: cython.ulonglong = self.bucket_of(hash)
        logged_store(self.words, self.log, self.at(slot) + E_CHAIN, load(self.words, bucket))
        fence_release()  # a reader who finds the slot finds the rest of the chain behind it
        logged_store(self.words, self.log, bucket, pack(high(hash), slot + 1))

    def unlink(self, slot: cython.ulonglong) -> bool:
        """Take a slot out of its chain; False when the chain does not lead to it."""
        link: cython.ulonglong = self.bucket_of(load(self.words, self.at(slot) + E_HASH))
        word: cython.ulonglong
        steps: cython.ulonglong = 0
        while steps <= self.slots:
            word = load(self.words, link)
            if not word:
                return False
            if low(word) == slot + 1:
                logged_store(self.words, self.log, link, load(self.words, self.at(slot) + E_CHAIN))
                return True
            link = self.at(low(word) - 1) + E_CHAIN
            steps += 1
        return False

    def take_free(self) -> int:
        """A free slot plus 1, no longer in the list of free ones; 0 when all are in use."""
        slot: cython.ulonglong = load(self.words, self.header + S_FREE_SLOT)
        if slot:
            if slot > self.slots:
                return 0
            logged_store(
                self.words, self.log, self.header + S_FREE_SLOT, low(load(self.words, self.at(slot - 1) + E_CHAIN))
            )
        return slot

    def give_free(self, slot: cython.ulonglong) -> None:
        """Put an unlinked slot back among the free ones."""
        word: cython.ulonglong = self.at(slot)
        logged_store(self.words, self.log, word + E_PLACE, with_low(load(self.words, word + E_PLACE), 0))
        logged_store(self.words, self.log, word + E_CHAIN, load(self.words, self.header + S_FREE_SLOT))
        logged_store(self.words, self.log, self.header + S_FREE_SLOT, slot + 1)

    def format_free(self) -> None:
        """Empty every bucket and free every slot, without a log: only while the shard's state says so.

        Versions go forward, so that a reader that is copying from a slot notices.
        """
        slot: cython.ulonglong
        word: cython.ulonglong
        stamp: cython.ulonglong = (load(self.words, self.header + S_STAMP) | 1) + 1
        store(self.words, self.header + S_STAMP, stamp)
        for slot in range(self.slots):
            word = self.at(slot)
            store(self.words, word + E_VERSION, stamp - 1)  # no reader may begin while the slot still looks used
            fence_release()
            store(self.words, word + E_PLACE, 0)
            store(self.words, word + E_CHAIN, slot + 2 if slot + 1 < self.slots else 0)
            store(self.words, self.buckets + slot, 0)
            store_release(self.words, word + E_VERSION, stamp)
        store(self.words, self.header + S_FREE_SLOT, 1)
