"""Where keys and values lie: everything that divides a shard's blocks into runs lives in this file.

Runs tile the blocks without a gap. A run is free, or in limbo, or an entry's. Free runs have their neighbours merged
and are found by length in bins (good fit, as in TLSF: Masmano et al., ECRTS 2004); boundary tags (Knuth, TAOCP 1, 2.5)
tell a run being freed whether the one before and the one after are free. A value takes one run if there is one long
enough, otherwise several, so any free block serves any value and fragmentation wastes nothing.

Limbo is what makes this safe to interrupt: bytes are only ever written into runs that a committed transaction took
out of the free ones, and whatever is in limbo when the lock's owner dies, the next one uses or frees. What an entry
leaves behind goes to limbo too. There it stays if it is one short run: the next entry is often just as long, and takes
it as it is, which saves dividing and merging free runs.
"""

from __future__ import annotations

from typing import Any

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

__all__ = ["Blocks"]


@cython.final
@cython.cclass
class Blocks:
    """The runs of one shard. A run is named by the number of its first block; lengths are in blocks, sizes in bytes.

    Every method that changes something needs the shard's lock; `place_of`, `holds`, `matches` and `read` do not, and
    may be given nonsense by a reader whose slot has changed meanwhile: they stay inside the segment and return.
    """

    def __init__(
        self, words: memoryview, data: memoryview, header: int, log: int, bins: int, first: int, count: int
    ) -> None:
        self.words = words
        self.data = data
        self.header = header
        self.log = log
        self.bins = bins
        self.first = first
        self.count = count
        self.reserved = 0

    # --- taking and giving back -------------------------------------------------------------------------------------
    def reserve(self, size: cython.ulonglong) -> bool:
        """Bring runs with room for `size` bytes into limbo, which is empty; each run is a transaction of its own.

        False when the free ones do not suffice: limbo has what there was, `reserved` says for how many bytes.
        """
        wanted: cython.ulonglong
        run: cython.ulonglong
        length: cython.ulonglong
        self.reserved = 0
        while self.reserved < size:
            wanted = (size - self.reserved + RUN_HEADER_BYTES + BLOCK_BYTES - 1) // BLOCK_BYTES
            run = self.find(wanted)
            if not run:
                return False
            run -= 1
            length = self.free_length(run)
            if length == 0:
                return False
            if length > wanted:
                length = wanted
            self.take(run, length)
            self.reserved += length * BLOCK_BYTES - RUN_HEADER_BYTES
            store_release(self.words, self.log + L_USED, 0)
        return True

    def has_spare(self, length: cython.ulonglong) -> bool:
        """Whether limbo is one run of just this length: then there is nothing to reserve."""
        run: cython.ulonglong = load(self.words, self.header + S_LIMBO)
        return run != 0 and self.used_length(run - 1) == length and not low(load(self.words, self.at(run - 1)))

    def settle(self) -> None:
        """Free what an entry left in limbo, unless it is one short run, which the next entry may use."""
        run: cython.ulonglong = load(self.words, self.header + S_LIMBO)
        if run and (self.used_length(run - 1) > SPARE_BLOCKS or low(load(self.words, self.at(run - 1)))):
            self.drain()

    def drain(self) -> None:
        """Free every run in limbo, one transaction each. What is no chain is given up: `repair` finds the blocks."""
        run: cython.ulonglong = load(self.words, self.header + S_LIMBO)
        steps: cython.ulonglong = 0
        while run:
            steps += 1
            if steps > self.count or not self.used_length(run - 1):
                store(self.words, self.header + S_LIMBO, 0)
                return
            logged_store(self.words, self.log, self.header + S_LIMBO, low(load(self.words, self.at(run - 1))))
            self.release(run - 1)
            store_release(self.words, self.log + L_USED, 0)
            run = load(self.words, self.header + S_LIMBO)

    # --- bytes ------------------------------------------------------------------------------------------------------
    def write(
        self, run: cython.ulonglong, skip: cython.ulonglong, source: cython.p_uchar, size: cython.ulonglong
    ) -> None:
        """Write `size` bytes into the chain that begins with `run`, after its first `skip` bytes."""
        room: cython.ulonglong
        while size:
            room = self.used_length(run)
            if not room:
                return
            room = room * BLOCK_BYTES - RUN_HEADER_BYTES
            if skip >= room:
                skip -= room
            else:
                room -= skip
                if room > size:
                    room = size
                if not copy_in(self.data, self.bytes_at(run) + skip, source, room):
                    return
                source = advance(source, room)
                size -= room
                skip = 0
            run = low(load(self.words, self.at(run)))
            if not run or run > self.count:
                return
            run -= 1

    def read(
        self,
        run: cython.ulonglong,
        skip: cython.ulonglong,
        target: Any,
        to: cython.ulonglong,
        size: cython.ulonglong,
    ) -> bool:
        """Copy `size` bytes of the chain, after its first `skip`, to `target[to:]`; False if the chain is shorter.

        `target` is a bytearray, or of `new_bytes`.
        """
        room: cython.ulonglong
        steps: cython.ulonglong = 0
        while size:
            if steps > self.count:
                return False
            steps += 1
            room = self.used_length(run)
            if not room:
                return False
            room = room * BLOCK_BYTES - RUN_HEADER_BYTES
            if skip >= room:
                skip -= room
            else:
                room -= skip
                if room > size:
                    room = size
                if not fill(target, to, self.data, self.bytes_at(run) + skip, room):
                    return False
                to += room
                size -= room
                skip = 0
            if size:
                run = low(load(self.words, self.at(run)))
                if not run:
                    return False
                run -= 1
        return True

    def matches(self, run: cython.ulonglong, other: cython.p_uchar, size: cython.ulonglong) -> bool:
        """Whether the chain begins with these bytes."""
        room: cython.ulonglong
        steps: cython.ulonglong = 0
        while True:
            if steps > self.count:
                return False
            steps += 1
            room = self.used_length(run)
            if not room:
                return False
            room = room * BLOCK_BYTES - RUN_HEADER_BYTES
            if room > size:
                room = size
            if not same_bytes(self.data, self.bytes_at(run), other, room):
                return False
            size -= room
            if not size:
                return True
            other = advance(other, room)
            run = low(load(self.words, self.at(run)))
            if not run:
                return False
            run -= 1

    def holds(self, run: cython.ulonglong, size: cython.ulonglong) -> bool:
        """Whether the chain is long enough for `size` bytes: to be asked before taking memory for a copy of them."""
        room: cython.ulonglong
        while True:
            room = self.used_length(run)
            if not room:
                return False
            room = room * BLOCK_BYTES - RUN_HEADER_BYTES
            if room >= size:
                return True
            size -= room
            run = low(load(self.words, self.at(run))) - 1

    # --- free runs --------------------------------------------------------------------------------------------------
    def find(self, length: cython.ulonglong) -> int:
        """A free run plus 1, 0 for none: at least `length` long if there is such a one, else of the longest bin."""
        bin: cython.ulonglong = self.used_bin(self.fitting_bin(length))
        run: cython.ulonglong
        if bin < BINS:
            return load(self.words, self.bins + BIN_BITMAP_WORDS + bin)
        # No bin whose every run is long enough: the first of the own bin may be; else take pieces, longest first.
        run = load(self.words, self.bins + BIN_BITMAP_WORDS + self.bin_of(length))
        if run and self.length(run - 1) >= length:
            return run
        if load(self.words, self.bins + 1):
            bin = 64 + highest_bit(load(self.words, self.bins + 1))
        elif load(self.words, self.bins):
            bin = highest_bit(load(self.words, self.bins))
        else:
            return 0
        return load(self.words, self.bins + BIN_BITMAP_WORDS + bin)

    def take(self, run: cython.ulonglong, length: cython.ulonglong) -> None:
        """Move the first `length` blocks of a free run to the front of limbo; the rest stays free."""
        whole: cython.ulonglong = self.length(run)
        self.unlink(run)
        # The run before a free one is never free, or they would be one.
        logged_store(self.words, self.log, self.at(run), pack(length, load(self.words, self.header + S_LIMBO)))
        logged_store(self.words, self.log, self.header + S_LIMBO, run + 1)
        if whole > length:
            self.link(run + length, whole - length)
        else:
            self.mark_after(run, whole, False)
        logged_store(
            self.words, self.log, self.header + S_FREE_BLOCKS, load(self.words, self.header + S_FREE_BLOCKS) - length
        )

    def release(self, run: cython.ulonglong) -> None:
        """Make a run that is not free so, and merge it with its free neighbours, where they prove to be free."""
        word: cython.ulonglong = load(self.words, self.at(run))
        length: cython.ulonglong = self.used_length(run)
        after: cython.ulonglong = run + length
        freed: cython.ulonglong = length
        more: cython.ulonglong = self.free_length(after)
        before: cython.ulonglong
        if more:
            self.unlink(after)
            length += more
        if high(word) & RUN_AFTER_FREE:
            before = load(self.words, self.at(run) - 1)
            if before < run and self.length(before) == run - before and self.is_marked_free(before):
                self.unlink(before)
                length += run - before
                run = before
        self.link(run, length)
        self.mark_after(run, length, True)
        logged_store(
            self.words, self.log, self.header + S_FREE_BLOCKS, load(self.words, self.header + S_FREE_BLOCKS) + freed
        )

    def link(self, run: cython.ulonglong, length: cython.ulonglong) -> None:
        """Write a free run's header and footer and put it into its bin."""
        bin: cython.ulonglong = self.bin_of(length)
        head: cython.ulonglong = load(self.words, self.bins + BIN_BITMAP_WORDS + bin)
        word: cython.ulonglong = self.at(run)
        if head and not self.is_marked_free(head - 1):
            head = 0  # nonsense, behind which nothing can be found
        logged_store(self.words, self.log, word, pack(length | RUN_FREE, 0))
        logged_store(self.words, self.log, word + 1, pack(head, 0))
        logged_store(self.words, self.log, word + length * BLOCK_WORDS - 1, run)
        if head:
            word = self.at(head - 1) + 1
            logged_store(self.words, self.log, word, with_low(load(self.words, word), run + 1))
        else:
            word = self.bins + bin // 64
            logged_store(self.words, self.log, word, load(self.words, word) | bit(bin % 64))
        logged_store(self.words, self.log, self.bins + BIN_BITMAP_WORDS + bin, run + 1)

    def unlink(self, run: cython.ulonglong) -> None:
        """Take a free run out of its bin."""
        links: cython.ulonglong = load(self.words, self.at(run) + 1)  # next in the upper half, previous below
        before: cython.ulonglong = low(links)
        after: cython.ulonglong = high(links)
        bin: cython.ulonglong = self.bin_of(self.length(run))
        word: cython.ulonglong
        # A neighbour that is none may be an entry's run, whose bytes these would be.
        if after:
            word = self.at(after - 1) + 1
            if self.is_marked_free(after - 1):
                logged_store(self.words, self.log, word, with_low(load(self.words, word), before))
        if before:
            word = self.at(before - 1) + 1
            if self.is_marked_free(before - 1):
                logged_store(self.words, self.log, word, with_high(load(self.words, word), after))
            return
        logged_store(self.words, self.log, self.bins + BIN_BITMAP_WORDS + bin, after)
        if not after:
            word = self.bins + bin // 64
            logged_store(self.words, self.log, word, load(self.words, word) & ~bit(bin % 64))

    def mark_after(self, run: cython.ulonglong, length: cython.ulonglong, free: bool) -> None:
        """Tell the run behind this one whether this one is free."""
        after: cython.ulonglong = run + length
        word: cython.ulonglong
        if after < self.count:
            word = load(self.words, self.at(after))
            logged_store(
                self.words,
                self.log,
                self.at(after),
                with_high(word, high(word) | RUN_AFTER_FREE if free else high(word) & ~RUN_AFTER_FREE),
            )

    # --- bins -------------------------------------------------------------------------------------------------------
    def bin_of(self, length: cython.ulonglong) -> int:
        """The bin a run of this length belongs into."""
        octave: cython.ulonglong
        if length < EXACT_BINS:
            return length
        octave = highest_bit(length)
        octave = EXACT_BINS + (octave - 5) * 4 + ((length >> (octave - 2)) & 3)
        return octave if octave < BINS else BINS - 1

    def fitting_bin(self, length: cython.ulonglong) -> int:
        """The lowest bin whose every run has at least this length."""
        bin: cython.ulonglong = self.bin_of(length)
        if length < EXACT_BINS:
            return bin
        if length & (bit(highest_bit(length) - 2) - 1):
            return bin + 1
        return bin

    def used_bin(self, lowest: cython.ulonglong) -> int:
        """The first bin from `lowest` on that has a run; BINS for none."""
        position: cython.ulonglong
        if lowest < 64:
            position = lowest_bit(load(self.words, self.bins) >> lowest << lowest)
            if position < 64:
                return position
            lowest = 64
        if lowest < BINS:
            position = lowest_bit(load(self.words, self.bins + 1) >> (lowest - 64) << (lowest - 64))
            if position < 64:
                return 64 + position
        return BINS

    # --- words ------------------------------------------------------------------------------------------------------
    def at(self, block: cython.ulonglong) -> int:
        """The word index of a block."""
        return record(self.first, BLOCK_WORDS, block, self.count)

    def place_of(self, run: cython.ulonglong, size: cython.ulonglong) -> int:
        """Where the bytes of an entry of `size` bytes begin; 0 unless they lie in this run alone."""
        length: cython.ulonglong
        if not 0 <= run < self.count:
            return 0
        length = high(load(self.words, self.first + run * BLOCK_WORDS)) & ~RUN_AFTER_FREE
        if length > self.count - run or size + RUN_HEADER_BYTES > length * BLOCK_BYTES:
            return 0
        return (self.first + run * BLOCK_WORDS) * 8 + RUN_HEADER_BYTES

    def bytes_at(self, run: cython.ulonglong) -> int:
        """Where the bytes of a run that has a length begin."""
        return (self.first + run * BLOCK_WORDS) * 8 + RUN_HEADER_BYTES

    def length(self, run: cython.ulonglong) -> int:
        """The length of a run, never past the end of the blocks; 0 if it is none."""
        length: cython.ulonglong = high(load(self.words, self.at(run))) & RUN_LENGTH_MASK
        return length if length <= self.count - run else 0

    def used_length(self, run: cython.ulonglong) -> int:
        """The same for a run that is not free; 0 if it is, as the flag then makes the number too large."""
        length: cython.ulonglong = high(load(self.words, self.first + run * BLOCK_WORDS)) & ~RUN_AFTER_FREE
        return length if 0 <= run < self.count and length <= self.count - run else 0

    def free_length(self, run: cython.ulonglong) -> int:
        """The same for a run that is free, as both its ends say; otherwise 0."""
        length: cython.ulonglong = self.length(run)
        if length and self.is_marked_free(run) and load(self.words, self.at(run) + length * BLOCK_WORDS - 1) == run:
            return length
        return 0

    def is_marked_free(self, run: cython.ulonglong) -> bool:
        return high(load(self.words, self.at(run))) & RUN_FREE != 0

    def format_free(self) -> None:
        """Make all blocks one free run, without a log: only while the shard's state says that nothing here counts."""
        bin: cython.ulonglong
        for bin in range(BIN_BITMAP_WORDS + BINS):
            store(self.words, self.bins + bin, 0)
        store(self.words, self.header + S_LIMBO, 0)
        store(self.words, self.header + S_FREE_BLOCKS, self.count)
        self.link(0, self.count)
        store(self.words, self.log + L_USED, 0)
