"""Changes of one shard that happen wholly or not at all, whenever their author dies.

`begin` makes the version of the one slot whose contents change odd, every store goes through `logged_store`, which
first writes down what was there before, and emptying the log is the commit. Whoever gets the lock of a dead owner finds
the log as it was left and calls `roll_back`. All of it needs the shard's lock.
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

__all__ = ["Journal"]


@cython.final
@cython.cclass
class Journal:
    """The undo log of one shard."""

    def __init__(
        self, words: memoryview, header: int, log: int, slots_at: int, slots: int, bins: int, end: int
    ) -> None:
        self.words = words
        self.header = header
        self.log = log
        self.slots_at = slots_at
        self.slots = slots
        self.bins = bins
        self.end = end

    def at(self, slot: cython.ulonglong) -> int:
        """The word index of a slot."""
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def begin(self, slot: cython.ulonglong) -> None:
        """Announce that the contents of a slot change: readers of it wait, recovery knows which."""
        stamp: cython.ulonglong = (load(self.words, self.header + S_STAMP) | 1) + 1
        store(self.words, self.header + S_STAMP, stamp)
        store(self.words, self.header + S_SUBJECT, slot + 1)
        store(self.words, self.at(slot) + E_VERSION, stamp - 1)
        fence_release()

    def commit(self, slot: cython.ulonglong) -> None:
        """Empty the log, which makes the transaction true, and only then let readers see it."""
        store_release(self.words, self.log + L_USED, 0)
        store_release(self.words, self.at(slot) + E_VERSION, load(self.words, self.header + S_STAMP))
        store(self.words, self.header + S_SUBJECT, 0)

    def commit_order(self) -> None:
        """Commit a change of the eviction order alone: no reader looks at it, so no version guards it."""
        store_release(self.words, self.log + L_USED, 0)

    def add(self, field: cython.ulonglong, by: cython.ulonglong) -> None:
        """Add to a word of the header, as part of the transaction."""
        word: cython.ulonglong = self.header + field
        logged_store(self.words, self.log, word, wrap(load(self.words, word) + by))

    def roll_back(self) -> None:
        """Put the old values back, newest first, and move the versions that readers may have seen forward."""
        used: cython.ulonglong = load(self.words, self.log + L_USED)
        subject: cython.ulonglong
        entry: cython.ulonglong
        word: cython.ulonglong
        stamp: cython.ulonglong
        # An insertion that is undone sends a reader who stands in its slot to the free ones: no miss counts meanwhile.
        store(self.words, self.header + S_SEQUENCE, load(self.words, self.header + S_SEQUENCE) | 1)
        fence_release()
        if used > LOG_ENTRIES:
            used = LOG_ENTRIES
        while used:
            used -= 1
            entry = self.log + L_ENTRIES + 2 * used
            word = load(self.words, entry)
            if self.is_logged(word):
                store(self.words, word, load(self.words, entry + 1))
        store_release(self.words, self.log + L_USED, 0)
        subject = load(self.words, self.header + S_SUBJECT)
        if subject and subject <= self.slots:
            stamp = (load(self.words, self.header + S_STAMP) | 1) + 1
            store(self.words, self.header + S_STAMP, stamp)
            store_release(self.words, self.at(subject - 1) + E_VERSION, stamp)
        store(self.words, self.header + S_SUBJECT, 0)
        store_release(self.words, self.header + S_SEQUENCE, (load(self.words, self.header + S_SEQUENCE) | 1) + 1)

    def is_logged(self, word: cython.ulonglong) -> bool:
        """Whether a transaction may change this word: not the lock, no version, and nothing of another shard."""
        if word < self.bins:
            return word == self.header + S_LIMBO or self.header + S_TICK <= word < self.header + SHARD_WORDS
        if word >= self.slots_at and word - self.slots_at < self.slots * SLOT_WORDS:
            return (word - self.slots_at) % SLOT_WORDS != E_VERSION
        return word < self.end
