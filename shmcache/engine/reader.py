"""Reading without a lock: find a slot, copy, and look at the slot's version again.

A version is odd while the slot's contents change, and another one afterwards. A miss counts only when the shard's
sequence number, which is odd while a chain loses a slot, did not move during the search.
"""

from __future__ import annotations

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.blocks import Blocks
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.membership import Member
    from cython.cimports.shmcache.engine.primitives import *
    from cython.cimports.shmcache.engine.request import Request
    from cython.cimports.shmcache.engine.table import Table
else:
    from shmcache.engine.blocks import Blocks
    from shmcache.engine.layout import *
    from shmcache.engine.membership import Member
    from shmcache.engine.primitives import *
    from shmcache.engine.request import Request
    from shmcache.engine.table import Table

__all__ = ["Reader"]


@cython.final
@cython.cclass
class Reader:
    """Reads the entries of one shard."""

    def __init__(
        self,
        words: memoryview,
        header: int,
        slots_at: int,
        slots: int,
        max_entry: int,
        table: Table,
        blocks: Blocks,
        member: Member,
    ) -> None:
        self.words = words
        self.data = blocks.data
        self.header = header
        self.slots_at = slots_at
        self.slots = slots
        self.max_entry = max_entry
        self.table = table
        self.blocks = blocks
        self.member = member

    def at(self, slot: cython.ulonglong) -> int:
        """The word index of a slot."""
        return record(self.slots_at, SLOT_WORDS, slot, self.slots)

    def read(self, request: Request, now: cython.ulonglong) -> int:
        """Copy the value of the request's key: DONE, ABSENT, or BUSY after too many collisions."""
        status: cython.int = self.read_once(request, now)
        return self.read_again(request, now, status) if status == BUSY or status == NO_ROOM else status

    def read_again(self, request: Request, now: cython.ulonglong, status: cython.int) -> int:
        """Go on with `read` after a first attempt that ended with `status`, BUSY or NO_ROOM."""
        _attempt: cython.int
        for _attempt in range(READ_ATTEMPTS):
            if status == NO_ROOM:
                request.make_room()
            else:
                self.member.count(C_READ_RETRIES, 1)
            status = self.read_once(request, now)
            if status != BUSY and status != NO_ROOM:
                return status
        return BUSY

    def read_once(self, request: Request, now: cython.ulonglong) -> int:
        """One attempt: DONE, ABSENT, BUSY after a collision, NO_ROOM when `scratch` is too short."""
        sequence: cython.ulonglong = load_acquire(self.words, self.header + S_SEQUENCE)
        link: cython.ulonglong = load_acquire(self.words, self.table.bucket_of(request.hash))
        tag: cython.ulonglong = high(request.hash)
        steps: cython.ulonglong = 0
        word: cython.ulonglong
        version: cython.ulonglong
        sizes: cython.ulonglong
        run: cython.ulonglong
        at: cython.ulonglong
        status: cython.int
        while link and steps <= self.slots:
            word = self.at(low(link) - 1)
            if high(link) == tag:
                version = load_acquire(self.words, word + E_VERSION)
                if version & 1:
                    return BUSY
                if load(self.words, word + E_HASH) == request.hash:
                    sizes = load(self.words, word + E_SIZES)
                    run = low(load(self.words, word + E_PLACE)) - 1
                    # Nearly all entries are one run: comparing and copying in place is half the work.
                    at = self.blocks.place_of(run, request.key_size + low(sizes))
                    if at and LARGE <= low(sizes) <= SCRATCH:
                        prefetch(self.data, at, low(sizes))  # a value of 1 KiB that is in no cache: 13 % faster
                    if high(sizes) == (request.key_size | request.key_kind << 16) and (
                        same_bytes(self.data, at, request.key, request.key_size)
                        if at
                        else self.blocks.matches(run, request.key, request.key_size)
                    ):
                        request.value_size = low(sizes)
                        request.slot = low(link) - 1
                        request.version = version
                        request.expiry = load(self.words, word + E_EXPIRY)
                        status = DONE
                        if request.wants_value and (request.expiry == 0 or request.expiry > now):
                            if at and request.value_size < LARGE and request.value_size <= size_of(request.scratch):
                                request.is_whole = False
                                copy(request.scratch, 0, self.data, at + request.key_size, request.value_size)
                            else:
                                status = self.copy_value(request, run, at)
                        fence_acquire()
                        if load(self.words, word + E_VERSION) != version:
                            return BUSY
                        if request.expiry and request.expiry <= now:
                            return ABSENT
                        return status
                    # Another key of the same hash, or this key's bytes moved while they were compared.
                    fence_acquire()
                    if load(self.words, word + E_VERSION) != version:
                        return BUSY
            link = load_acquire(self.words, word + E_CHAIN)
            steps += 1
        fence_acquire()
        if sequence & 1 or load(self.words, self.header + S_SEQUENCE) != sequence:
            return BUSY
        return ABSENT

    def copy_value(self, request: Request, run: cython.ulonglong, at: cython.ulonglong) -> int:
        """Copy the value behind the key: DONE, NO_ROOM, or CORRUPT, which may be a torn read: the version will tell.

        `at` is where key and value lie if they lie in one piece, and 0 if they do not.
        """
        size: cython.ulonglong = request.value_size
        status: cython.int
        request.is_whole = False
        if size > self.max_entry:
            return CORRUPT
        if size >= LARGE:
            status = self.copy_whole(request, run, at)
            if status != NO_ROOM:
                return status
        if size > size_of(request.scratch):
            request.room = size
            return NO_ROOM
        return DONE if self.blocks.read(run, request.key_size, request.scratch_memory, 0, size) else CORRUPT

    def copy_whole(self, request: Request, run: cython.ulonglong, at: cython.ulonglong) -> int:
        """Copy bytes, or what is too large for `scratch`, straight into an object that is returned or decoded as it is.

        NO_ROOM if it is neither, or for want of memory.
        """
        size: cython.ulonglong = request.value_size
        mark: cython.ulonglong
        if at:
            copy(request.small, HEAD_AT, self.data, at + request.key_size, 5)
        elif not self.blocks.holds(run, request.key_size + size):
            return CORRUPT
        else:
            self.blocks.read(run, request.key_size, request.small_memory, HEAD_AT, 5)
        mark = read_number(request.small, HEAD_AT, 1)
        request.skip = 1 + (1 << (mark - 0xC4)) if 0xC4 <= mark <= 0xC6 else 0  # the head of bytes
        if not request.skip and size <= SCRATCH:
            return NO_ROOM
        request.whole = new_bytes(size - request.skip)
        if request.whole is None:
            return NO_ROOM
        request.is_whole = True
        size -= request.skip
        if at:
            return DONE if fill(request.whole, 0, self.data, at + request.key_size + request.skip, size) else CORRUPT
        return DONE if self.blocks.read(run, request.key_size + request.skip, request.whole, 0, size) else CORRUPT

    def read_slot(self, request: Request, slot: cython.ulonglong, now: cython.ulonglong) -> int:
        """Copy key and value of whatever a slot holds into `scratch`: DONE, ABSENT, BUSY, NO_ROOM, CORRUPT."""
        word: cython.ulonglong = self.at(slot)
        version: cython.ulonglong = load_acquire(self.words, word + E_VERSION)
        run: cython.ulonglong = low(load(self.words, word + E_PLACE))
        sizes: cython.ulonglong = load(self.words, word + E_SIZES)
        size: cython.ulonglong
        status: cython.int = DONE
        request.expiry = load(self.words, word + E_EXPIRY)
        if version & 1:
            return BUSY
        if not run or (request.expiry and request.expiry <= now):
            return ABSENT
        request.key_size = high(sizes) & 0xFFFF
        request.key_kind = high(sizes) >> 16
        request.value_size = low(sizes)
        request.version = version
        request.slot = slot
        size = request.key_size + request.value_size
        if size > self.max_entry:
            status = CORRUPT
        elif size > size_of(request.scratch):
            request.room = size
            status = NO_ROOM if self.blocks.holds(run - 1, size) else CORRUPT
        elif not self.blocks.read(run - 1, 0, request.scratch_memory, 0, size):
            status = CORRUPT
        fence_acquire()
        if load(self.words, word + E_VERSION) != version:
            return BUSY
        return status
