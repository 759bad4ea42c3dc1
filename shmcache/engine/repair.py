"""Whether a shard is sound, and how to make it so: the invariants of the segment are stated here, as code.

The slots are the truth. Buckets, free lists, eviction order, timer wheel and the division of the blocks follow from
them: `check` compares, `rebuild` makes them anew, dropping the entries it cannot prove. Both need the shard's lock. A
rebuild may die at any store: the shard's state says so, and the next owner of the lock begins again.
"""

from __future__ import annotations

import gc

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.primitives import *
    from cython.cimports.shmcache.engine.shard import Shard
else:
    from shmcache.engine.layout import *
    from shmcache.engine.primitives import *
    from shmcache.engine.shard import Shard

__all__ = ["inspect_locked"]

MAX_PROBLEMS = 100  # of one shard; a broken list would otherwise be reported entry by entry


def inspect_locked(shard: Shard, rebuild: bool) -> list[str]:
    """What is wrong with the shard, in words; or with `rebuild`, which entries were dropped, and why."""
    collecting = gc.isenabled()
    gc.disable()  # or it might run somebody's finalizer while we hold the lock
    try:
        inspector = Inspector(shard)
        if rebuild:
            inspector.rebuild()
        else:
            inspector.check()
        return inspector.problems
    finally:
        if collecting:
            gc.enable()


@cython.final
@cython.cclass
class Inspector:
    """One look at one shard. `claimed` has a byte for each block: 1 the start of an entry's run, 2 the rest of it."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.claimed = memoryview(bytearray(shard.blocks.count))
        self.seen = memoryview(bytearray(shard.slots))
        self.problems: list[str] = []
        self.used = self.timed = self.used_bytes = self.claimed_runs = 0

    def check(self) -> None:
        self.slots()
        self.buckets()
        self.free_slots()
        self.order()
        self.wheel()
        self.runs()
        self.bins()
        self.totals()

    def report(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    # --- the slots --------------------------------------------------------------------------------------------------
    def slots(self) -> None:
        """Every used slot describes an entry: its own runs, long enough, with the key whose hash it has."""
        slot: cython.ulonglong
        for slot in range(self.shard.slots):
            if low(load(self.shard.words, self.shard.at(slot) + E_PLACE)):
                if not self.is_sound(slot):
                    self.report(f"slot {slot}: its key, its sizes or its runs contradict each other")
                self.used += 1
                self.timed += load(self.shard.words, self.shard.at(slot) + E_EXPIRY) != 0
                sizes: cython.ulonglong = load(self.shard.words, self.shard.at(slot) + E_SIZES)
                self.used_bytes += (high(sizes) & 0xFFFF) + low(sizes)
            if load(self.shard.words, self.shard.at(slot) + E_VERSION) & 1:
                self.report(f"slot {slot}: its version is odd, though nobody is changing it")
            elif load(self.shard.words, self.shard.at(slot) + E_VERSION) > load(
                self.shard.words, self.shard.header + S_STAMP
            ):
                self.report(f"slot {slot}: its version has not been given to any slot yet")

    def is_sound(self, slot: cython.ulonglong) -> bool:
        """Whether a used slot describes an entry; if so its blocks are claimed."""
        kind: cython.ulonglong = high(load(self.shard.words, self.shard.at(slot) + E_SIZES)) >> 16
        if kind == 0 or kind > KEY_PACKED or not self.claim(slot):
            return False
        if self.hash_is_right(slot):
            return True
        self.disclaim(slot)
        return False

    def claim(self, slot: cython.ulonglong) -> bool:
        """Claim the blocks of the slot's chain; False, with none claimed, if it is no chain of the right length."""
        sizes: cython.ulonglong = load(self.shard.words, self.shard.at(slot) + E_SIZES)
        size: cython.ulonglong = (high(sizes) & 0xFFFF) + low(sizes)
        run: cython.ulonglong = low(load(self.shard.words, self.shard.at(slot) + E_PLACE))
        room: cython.ulonglong = 0
        length: cython.ulonglong
        self.claimed_runs = 0
        while run:
            run -= 1
            length = self.shard.blocks.length(run)
            if (
                length == 0
                or room >= size
                or high(load(self.shard.words, self.shard.blocks.at(run))) & RUN_FREE
                or not self.is_unclaimed(run, length)
            ):
                self.disclaim(slot)
                return False
            self.mark(run, length, True)
            self.claimed_runs += 1
            room += length * BLOCK_BYTES - RUN_HEADER_BYTES
            run = low(load(self.shard.words, self.shard.blocks.at(run)))
        if room < size:
            self.disclaim(slot)
            return False
        return True

    def disclaim(self, slot: cython.ulonglong) -> None:
        """Take back the runs that the last `claim`, which was for this slot, has claimed."""
        run: cython.ulonglong = low(load(self.shard.words, self.shard.at(slot) + E_PLACE))
        while self.claimed_runs:
            self.mark(run - 1, self.shard.blocks.length(run - 1), False)
            self.claimed_runs -= 1
            run = low(load(self.shard.words, self.shard.blocks.at(run - 1)))

    def is_unclaimed(self, run: cython.ulonglong, length: cython.ulonglong) -> bool:
        block: cython.ulonglong
        for block in range(run, run + length):  # noqa: SIM110 - a generator would be a Python object in C
            if self.claimed[block]:
                return False
        return True

    def mark(self, run: cython.ulonglong, length: cython.ulonglong, claimed: bool) -> None:
        block: cython.ulonglong
        for block in range(run, run + length):
            self.claimed[block] = 0 if not claimed else 1 if block == run else 2

    def hash_is_right(self, slot: cython.ulonglong) -> bool:
        sizes: cython.ulonglong = load(self.shard.words, self.shard.at(slot) + E_SIZES)
        size: cython.ulonglong = high(sizes) & 0xFFFF
        key = bytearray(size + 1)
        run: cython.ulonglong = low(load(self.shard.words, self.shard.at(slot) + E_PLACE)) - 1
        return self.shard.blocks.read(run, 0, key, 0, size) and key_hash(
            pointer(memoryview(key), 0, size), size, high(sizes) >> 16, self.shard.secret0, self.shard.secret1
        ) == load(self.shard.words, self.shard.at(slot) + E_HASH)

    # --- what follows from the slots --------------------------------------------------------------------------------
    def buckets(self) -> None:
        """Every used slot is in the chain of its bucket, once, under its tag; nothing else is."""
        bucket: cython.ulonglong
        link: cython.ulonglong
        slot: cython.ulonglong
        found: cython.ulonglong = 0
        for slot in range(self.shard.slots):
            self.seen[slot] = 0
        for bucket in range(self.shard.slots):
            link = load(self.shard.words, self.shard.table.buckets + bucket)
            while link:
                slot = low(link) - 1
                if slot >= self.shard.slots or self.seen[slot]:
                    self.report(
                        f"bucket {bucket}: its chain leads to slot {slot}, outside the table or for a second time"
                    )
                    break
                self.seen[slot] = 1
                found += 1
                hash: cython.ulonglong = load(self.shard.words, self.shard.at(slot) + E_HASH)
                if not low(load(self.shard.words, self.shard.at(slot) + E_PLACE)):
                    self.report(f"bucket {bucket}: its chain leads to slot {slot}, which is free")
                elif self.shard.table.bucket_of(hash) != self.shard.table.buckets + bucket or high(hash) != high(link):
                    self.report(f"bucket {bucket}: its chain leads to slot {slot} of another bucket or tag")
                link = load(self.shard.words, self.shard.at(slot) + E_CHAIN)
        if found != self.used:
            self.report(f"{found} slots are in chains, but {self.used} are used")

    def free_slots(self) -> None:
        """The list of free slots has all others, once."""
        slot: cython.ulonglong = load(self.shard.words, self.shard.header + S_FREE_SLOT)
        found: cython.ulonglong = 0
        while slot:
            if slot > self.shard.slots or self.seen[slot - 1]:
                self.report(f"the free slots lead to slot {slot - 1}, outside the table, in use or for a second time")
                return
            self.seen[slot - 1] = 1
            if low(load(self.shard.words, self.shard.at(slot - 1) + E_PLACE)):
                self.report(f"slot {slot - 1} is in use and among the free ones")
            found += 1
            slot = low(load(self.shard.words, self.shard.at(slot - 1) + E_CHAIN))
        if found + self.used != self.shard.slots:
            self.report(f"{found} slots are free and {self.used} used, of {self.shard.slots}")

    def order(self) -> None:
        """The eviction list has every used slot, once, linked both ways."""
        ends: cython.ulonglong = load(self.shard.words, self.shard.header + S_ORDER)
        slot: cython.ulonglong = low(ends)
        before: cython.ulonglong = 0
        found: cython.ulonglong = 0
        while slot:
            if slot > self.shard.slots or found > self.used:
                self.report(f"the eviction list leads to slot {slot - 1}, outside the table or in a circle")
                return
            links: cython.ulonglong = load(self.shard.words, self.shard.at(slot - 1) + E_ORDER)
            if low(links) != before or not low(load(self.shard.words, self.shard.at(slot - 1) + E_PLACE)):
                self.report(f"slot {slot - 1}: its place in the eviction list is not linked back, or it is free")
                return
            found += 1
            before = slot
            slot = high(links)
        if found != self.used or before != high(ends):
            self.report(
                f"the eviction list has {found} slots and ends at {before}, expected {self.used} and {high(ends)}"
            )

    def wheel(self) -> None:
        """The timer wheel has every slot with an expiry, once, in a list that comes up in time."""
        number: cython.ulonglong
        slot: cython.ulonglong
        before: cython.ulonglong
        expiry: cython.ulonglong
        found: cython.ulonglong = 0
        for number in range(WHEEL_LISTS):
            slot = load(self.shard.words, self.shard.wheel.lists + number)
            before = WHEEL_FIRST | number
            while slot:
                if slot > self.shard.slots or found > self.timed:
                    self.report(f"timer list {number} leads to slot {slot - 1}, outside the table or in a circle")
                    return
                links: cython.ulonglong = load(self.shard.words, self.shard.at(slot - 1) + E_TIMER)
                expiry = load(self.shard.words, self.shard.at(slot - 1) + E_EXPIRY)
                if not expiry or low(links) != before or not self.is_in_time(number, expiry >> WHEEL_SHIFT):
                    self.report(f"slot {slot - 1}: it is in timer list {number} wrongly, or not linked back")
                    return
                found += 1
                before = slot
                slot = high(links)
        if found != self.timed:
            self.report(f"the timer wheel has {found} slots, but {self.timed} have an expiry")

    def is_in_time(self, number: cython.ulonglong, tick: cython.ulonglong) -> bool:
        """Whether the hand of the wheel comes to this list no later than at this tick."""
        level: cython.ulonglong = number >> WHEEL_BITS
        hand: cython.ulonglong = load(self.shard.words, self.shard.header + S_HAND)
        if number == self.shard.wheel.number_of(tick):
            return True
        ahead: cython.ulonglong = (number - (hand >> level * WHEEL_BITS)) & WHEEL_MASK
        return level != 0 and (hand >> level * WHEEL_BITS) + ahead <= tick >> level * WHEEL_BITS

    def runs(self) -> None:
        """Runs tile the blocks; each is free or an entry's; no two free ones are neighbours; tags are right."""
        run: cython.ulonglong = 0
        length: cython.ulonglong
        flags: cython.ulonglong
        free: cython.ulonglong = 0
        after_free: cython.bint = False
        while run < self.shard.blocks.count:
            length = self.shard.blocks.length(run)
            flags = high(load(self.shard.words, self.shard.blocks.at(run)))
            if not length:
                self.report(f"block {run}: the run that begins here has no length")
                return
            if ((flags & RUN_AFTER_FREE) != 0) != after_free:
                self.report(f"block {run}: its run is wrong about whether the one before is free")
            if flags & RUN_FREE:
                if after_free:
                    self.report(f"block {run}: its free run should be one with the one before")
                if self.claimed[run]:
                    self.report(f"block {run}: its run is free, but an entry has it")
                if load(self.shard.words, self.shard.blocks.at(run) + length * BLOCK_WORDS - 1) != run:
                    self.report(f"block {run}: its free run does not end with its beginning")
                free += length
                after_free = True
            else:
                if self.claimed[run] != 1:
                    self.report(f"block {run}: its run is neither free nor an entry's")
                after_free = False
            run += length
        if free != load(self.shard.words, self.shard.header + S_FREE_BLOCKS):
            self.report(
                f"{free} blocks are free, the header has {load(self.shard.words, self.shard.header + S_FREE_BLOCKS)}"
            )

    def bins(self) -> None:
        """Every free run is in the bin of its length."""
        number: cython.ulonglong
        run: cython.ulonglong
        before: cython.ulonglong
        free: cython.ulonglong = 0
        for number in range(BINS):
            run = load(self.shard.words, self.shard.blocks.bins + BIN_BITMAP_WORDS + number)
            if (run != 0) != ((load(self.shard.words, self.shard.blocks.bins + number // 64) & bit(number % 64)) != 0):
                self.report(f"bin {number}: its bit does not tell whether it has a run")
            before = 0
            while run:
                if run > self.shard.blocks.count or free > self.shard.blocks.count:
                    self.report(f"bin {number} leads to block {run - 1}, outside the blocks or in a circle")
                    return
                links: cython.ulonglong = load(self.shard.words, self.shard.blocks.at(run - 1) + 1)
                if (
                    not high(load(self.shard.words, self.shard.blocks.at(run - 1))) & RUN_FREE
                    or self.shard.blocks.bin_of(self.shard.blocks.length(run - 1)) != number
                    or low(links) != before
                ):
                    self.report(f"block {run - 1}: it is in bin {number} wrongly, or not linked back")
                    return
                free += self.shard.blocks.length(run - 1)
                before = run
                run = high(links)
        if free != load(self.shard.words, self.shard.header + S_FREE_BLOCKS):
            self.report(
                f"{free} blocks in bins, the header has {load(self.shard.words, self.shard.header + S_FREE_BLOCKS)}"
            )

    def totals(self) -> None:
        """The header's totals are those of the slots."""
        entries: cython.ulonglong = load(self.shard.words, self.shard.header + S_ENTRIES)
        used: cython.ulonglong = load(self.shard.words, self.shard.header + S_USED_BYTES)
        if not self.stamp_is_sound():
            self.report("the header's last version is odd, or higher than versions get")
        if entries != self.used:
            self.report(f"the header counts {entries} entries, the slots {self.used}")
        if used != self.used_bytes:
            self.report(f"the header counts {used} bytes of keys and values, the slots {self.used_bytes}")

    def stamp_is_sound(self) -> bool:
        stamp: cython.ulonglong = load(self.shard.words, self.shard.header + S_STAMP)
        return stamp < bit(STAMP_BITS) and not stamp & 1

    # --- making it so -----------------------------------------------------------------------------------------------
    def rebuild(self) -> None:
        shard: Shard = self.shard
        store(shard.words, shard.header + S_SEQUENCE, load(shard.words, shard.header + S_SEQUENCE) | 1)
        store_release(shard.words, shard.header + S_STATE, STATE_REPAIRING)
        fence_release()
        store(shard.words, shard.log + L_USED, 0)
        store(shard.words, shard.header + S_SUBJECT, 0)
        store(shard.words, shard.header + S_LIMBO, 0)
        self.rebuild_table()
        self.rebuild_lists()
        self.rebuild_runs()
        store(shard.words, shard.header + S_ENTRIES, self.used)
        store(shard.words, shard.header + S_USED_BYTES, self.used_bytes)
        store_release(shard.words, shard.header + S_STATE, STATE_READY)
        store_release(shard.words, shard.header + S_SEQUENCE, (load(shard.words, shard.header + S_SEQUENCE) | 1) + 1)

    def drop(self, slot: cython.ulonglong, why: str) -> None:
        """Free a slot that cannot be proved to hold an entry."""
        shard: Shard = self.shard
        stamp: cython.ulonglong = (load(shard.words, shard.header + S_STAMP) | 1) + 1
        store(shard.words, shard.header + S_STAMP, stamp)
        store(shard.words, shard.at(slot) + E_VERSION, stamp - 1)  # no reader may begin while it still looks used
        fence_release()
        store(shard.words, shard.at(slot) + E_PLACE, with_low(load(shard.words, shard.at(slot) + E_PLACE), 0))
        store_release(shard.words, shard.at(slot) + E_VERSION, stamp)
        self.report(f"slot {slot} was dropped: {why}")

    def rebuild_table(self) -> None:
        """Link every sound slot into its bucket and all others into the list of free ones."""
        shard: Shard = self.shard
        slot: cython.ulonglong
        sizes: cython.ulonglong
        version: cython.ulonglong
        highest: cython.ulonglong = 0
        for slot in range(shard.slots):
            store(shard.words, shard.table.buckets + slot, 0)
            version = load(shard.words, shard.at(slot) + E_VERSION)
            if version < bit(STAMP_BITS) and version > highest:
                highest = version
        if not self.stamp_is_sound() or load(shard.words, shard.header + S_STAMP) < highest:
            store(shard.words, shard.header + S_STAMP, (highest | 1) + 1)
        store(shard.words, shard.header + S_FREE_SLOT, 0)
        for slot in range(shard.slots):
            if low(load(shard.words, shard.at(slot) + E_PLACE)):
                if not self.is_sound(slot):
                    self.drop(slot, "its key, its sizes or its runs contradicted each other")
                elif self.has_twin(slot):
                    self.disclaim(slot)
                    self.drop(slot, "another slot has the same key")
            if load(shard.words, shard.at(slot) + E_VERSION) & 1 or load(
                shard.words, shard.at(slot) + E_VERSION
            ) > load(shard.words, shard.header + S_STAMP):
                store(shard.words, shard.header + S_STAMP, load(shard.words, shard.header + S_STAMP) + 2)
                store_release(shard.words, shard.at(slot) + E_VERSION, load(shard.words, shard.header + S_STAMP))
            if low(load(shard.words, shard.at(slot) + E_PLACE)):
                shard.table.link(slot, load(shard.words, shard.at(slot) + E_HASH))
                sizes = load(shard.words, shard.at(slot) + E_SIZES)
                self.used += 1
                self.used_bytes += (high(sizes) & 0xFFFF) + low(sizes)
            else:
                shard.table.give_free(slot)
            store(shard.words, shard.log + L_USED, 0)

    def has_twin(self, slot: cython.ulonglong) -> bool:
        """Whether a linked slot has the same hash and key size; 64 bits of secret hash stand for the key."""
        shard: Shard = self.shard
        hash: cython.ulonglong = load(shard.words, shard.at(slot) + E_HASH)
        link: cython.ulonglong = load(shard.words, shard.table.bucket_of(hash))
        steps: cython.ulonglong = 0
        while link and steps <= shard.slots:
            steps += 1
            if load(shard.words, shard.at(low(link) - 1) + E_HASH) == hash and high(
                load(shard.words, shard.at(low(link) - 1) + E_SIZES)
            ) == high(load(shard.words, shard.at(slot) + E_SIZES)):
                return True
            link = load(shard.words, shard.at(low(link) - 1) + E_CHAIN)
        return False

    def rebuild_lists(self) -> None:
        """Order the entries by their last use, and put those with an expiry into the timer wheel."""
        shard: Shard = self.shard
        slot: cython.ulonglong
        now: cython.ulonglong = low(load(shard.words, shard.header + S_TICK))
        store(shard.words, shard.header + S_ORDER, 0)
        self.set_hand()
        for slot in range(WHEEL_LISTS):
            store(shard.words, shard.wheel.lists + slot, 0)
        used = []
        for slot in range(shard.slots):
            if low(load(shard.words, shard.at(slot) + E_PLACE)):
                age: cython.ulonglong = low(wrap(now - high(load(shard.words, shard.at(slot) + E_PLACE))))
                used.append((age, slot))
        # Ticks stay as they are: a rebuild that dies half-way must find the same order when it begins again.
        used.sort()
        before: cython.ulonglong = 0
        after: cython.ulonglong
        place: cython.ulonglong
        for place in range(len(used)):
            slot = used[place][1]
            after = used[place + 1][1] + 1 if place + 1 < len(used) else 0
            store(shard.words, shard.at(slot) + E_ORDER, pack(after, before))
            before = slot + 1
            if load(shard.words, shard.at(slot) + E_EXPIRY):
                shard.wheel.on_insert(slot)
                store(shard.words, shard.log + L_USED, 0)
        if used:
            store(shard.words, shard.header + S_ORDER, pack(before, used[0][1] + 1))

    def set_hand(self) -> None:
        """Set the hand of the wheel to where it was, but no later than now, and than the first entry expires."""
        shard: Shard = self.shard
        slot: cython.ulonglong
        tick: cython.ulonglong
        today: cython.ulonglong = shard.now >> WHEEL_SHIFT
        hand: cython.ulonglong = load(shard.words, shard.header + S_HAND)
        if hand == 0 or hand > today:
            hand = today
        for slot in range(shard.slots):
            tick = load(shard.words, shard.at(slot) + E_EXPIRY) >> WHEEL_SHIFT
            if tick and low(load(shard.words, shard.at(slot) + E_PLACE)) and tick < hand:
                hand = tick
        store(shard.words, shard.header + S_HAND, hand)

    def rebuild_runs(self) -> None:
        """Make every block that no entry claims free, and tell each run about the one before."""
        shard: Shard = self.shard
        run: cython.ulonglong
        length: cython.ulonglong
        total: cython.ulonglong = 0
        word: cython.ulonglong
        for run in range(BIN_BITMAP_WORDS + BINS):
            store(shard.words, shard.blocks.bins + run, 0)
        run = 0
        after_free: cython.bint = False
        while run < shard.blocks.count:
            length = 0
            while run + length < shard.blocks.count and not self.claimed[run + length]:
                length += 1
            if length:
                shard.blocks.link(run, length)
                store(shard.words, shard.log + L_USED, 0)
                total += length
                after_free = True
            else:
                word = load(shard.words, shard.blocks.at(run))
                length = 1
                while run + length < shard.blocks.count and self.claimed[run + length] == 2:
                    length += 1
                store(
                    shard.words, shard.blocks.at(run), pack(length | (RUN_AFTER_FREE if after_free else 0), low(word))
                )
                after_free = False
            run += length
        store(shard.words, shard.header + S_FREE_BLOCKS, total)
