"""Where every word of the segment lies: this file owns the offsets and all other constants of the engine, which
`layout.pxd` repeats for C.

The segment is an array of 64-bit words in native byte order. A word is the unit of every store.

    +--------------------------- header, 64 words ----------------------------+
    | magic, version, flags, geometry, hash secret, totals of dead processes  |
    +------------------ process table, 16 words a process --------------------+
    | generation, pid, attach time ...      | hits, misses, sets, deletes ... |
    +---------------------------- shard 0 ------------------------------------+
    | header, 32 words:   line 0  lock word and what recovery needs           |
    |                     line 1  what readers look at                        |
    |                     line 2  structure heads, line 3  statistics         |
    | undo log: entries in use, then (word index, old value) for each         |
    | bins of free runs by length: bitmap, then a head for each bin           |
    | timer wheel: a head for each list                                       |
    | buckets: one link word each                                             |
    | slots, 8 words each                                                     |
    | blocks, 8 words each: runs of keys and values, and free runs            |
    +---------------------------- shard 1 ... --------------------------------+

A link word holds `tag << 32 | slot + 1`, where the tag is the upper half of the key's hash; 0 ends a chain. Lists that
hold two numbers in a word (previous and next, head and tail) keep `number + 1`, so that zeroed memory means empty.

A run is one or more adjacent blocks. Its first word is its header:

    bit 63 the run before is free | bit 62 this run is free | bits 32..61 length in blocks | bits 0..31 next run + 1

An entry is a chain of runs, nearly always of one: behind each header come key bytes, then value bytes. A free run
keeps its neighbours of the same bin in its second word and its own first block in its last word.
"""

from __future__ import annotations

from typing import NamedTuple

# --- the header -----------------------------------------------------------------------------------------------------
MAGIC = 0x5348_4D43_4143_4845  # "SHMCACHE"; read backwards, it betrays the other byte order
LAYOUT_VERSION = 1
H_MAGIC = 0  # written last at creation: without it the segment is half made
H_VERSION = 1
H_FLAGS = 2
H_BYTES = 3
H_ENTRIES = 4
H_SHARDS = 5
H_SLOTS = 6
H_BLOCKS = 7
H_PROCESSES = 8
H_EVICTION = 9
H_SECRET = 10  # two words
H_CREATED = 12  # wall clock, ns
H_CREATOR = 13  # pid, for people to read; it proves nothing
H_DEFAULT_TTL = 14  # ns, 0 for none
H_LOCK_FILE = 15  # inode of the lock file this segment belongs to
H_TOTALS = 16  # eight counters of processes that are gone
H_FOLDING = 24  # line + 1 whose counters are being added to the totals; it and H_TOTALS do not count while it is set
H_FOLDED = 25  # eight words, what the totals will be
HEADER_WORDS = 64

FLAG_COMPILED = 1
FLAG_EPHEMERAL = 2

# --- the process table ----------------------------------------------------------------------------------------------
P_GENERATION = 0
P_PID = 1
P_ATTACHED = 2  # wall clock, ns
P_STARTED = 3  # with P_PID in P_NAMESPACE, who it is: clock ticks since boot, 0 where nobody tells
P_NAMESPACE = 4  # inode of the pid namespace
P_COUNTERS = 8
PROCESS_WORDS = 16
MIN_PROCESSES = 64
MAX_PROCESSES = 1024
MAX_SHARDS = 64

C_HITS = 0
C_MISSES = 1
C_SETS = 2
C_DELETES = 3
C_LOCK_WAITS = 4
C_LOCK_WAIT_NS = 5
C_READ_RETRIES = 6
C_RECOVERIES = 7
COUNTERS = 8

# --- a shard's header -----------------------------------------------------------------------------------------------
S_LOCK = 0  # owner id of the holder, 0 when free
S_WAITERS = 1
S_SUBJECT = 2  # slot + 1 whose contents are being changed
S_LIMBO = 3  # first block + 1 of a chain that is neither free nor an entry's, 0 for none
S_STATE = 4
S_SEQUENCE = 8  # odd while a chain loses a slot
S_STAMP = 9  # the last version given to a slot, always even
S_TICK = 10  # the time of the eviction order: `eviction.py` says what is a tick; modulo 2**32
S_ORDER = 16  # head and tail of the eviction list
S_FREE_SLOT = 17
S_ENTRIES = 18
S_FREE_BLOCKS = 19
S_USED_BYTES = 20  # of keys and values
S_HAND = 21  # the timer wheel's earliest tick that may still have entries, 0 in a new one
S_EVICTIONS = 24
S_EXPIRATIONS = 25
S_PEAK_ENTRIES = 26
S_PEAK_BYTES = 27
SHARD_WORDS = 32

STATE_READY = 0
STATE_CLEARING = 1  # the shard is empty by decree; whoever gets the lock finishes emptying it
STATE_REPAIRING = 2  # only the slots count; whoever gets the lock repairs again

L_USED = 0
L_ENTRIES = 1
LOG_ENTRIES = 96  # five times what the longest transaction, an insertion, has been seen to store

BINS = 128
BIN_BITMAP_WORDS = 2
EXACT_BINS = 32  # runs of 1 to 31 blocks have a bin each, longer ones four bins an octave

WHEEL_BITS = 5
WHEEL_LEVELS = 4
WHEEL_LISTS = WHEEL_LEVELS << WHEEL_BITS
WHEEL_MASK = (1 << WHEEL_BITS) - 1
WHEEL_FIRST = 0x8000_0000  # marks the number of a list
ENDED = 0xFFFF_FFFF  # where a search of a timer list goes on once it has reached the end
WHEEL_SHIFT = 30  # a tick is 2**30 ns, about a second
WHEEL_AHEAD = 1 << 18  # ticks that the hand may be ahead of a writer who waited for the lock: three days

# --- a slot ---------------------------------------------------------------------------------------------------------
E_VERSION = 0  # odd while the contents change
E_HASH = 1
E_EXPIRY = 2  # ns of the monotonic clock, 0 for never
E_SIZES = 3  # value size | key size << 32 | kind of key << 48
E_PLACE = 4  # first block + 1 (0: the slot is free) | tick of its last move << 32
E_TIMER = 5  # neighbours in a list of the timer wheel
E_ORDER = 6  # neighbours in the eviction list
E_CHAIN = 7  # link to the next slot of the bucket, or of the free slots
SLOT_WORDS = 8

KEY_TEXT = 1  # the key bytes are the UTF-8 of a str
KEY_BYTES = 2
KEY_PACKED = 3  # msgpack of anything else

TUPLE = 1  # the msgpack extension of a tuple (codec.py)
BIG_INT = 5  # the msgpack extension of an int beyond 64 bits (codec.py)
SCRATCH = 4096  # bytes for a copy of a value that a request begins with
TUPLE_ROOM = 256  # bytes for a tuple that is a key: a longer one takes the slow way
TUPLE_AT = 4  # where in it the parts are, behind a header
LARGE = 256  # bytes from where on a value that is bytes is copied straight into the object that is returned
HEAD_AT = 16  # where in a request's small memory the value's head is, behind a number that is the key
PLAIN_DEPTH = 16  # levels of lists and dicts that are read and written without codec.py
MAX_PLAIN = 1 << 20  # and bytes of a message that is written so
KNOWN_KEYS = 256  # keys of dicts that are kept, a power of 2

# --- blocks ---------------------------------------------------------------------------------------------------------
BLOCK_WORDS = 8
BLOCK_BYTES = 64
RUN_HEADER_BYTES = 8
SPARE_BLOCKS = 64  # a longer run does not wait in limbo for the next entry: copying it is most of the work
# The upper half of a run's header: its length and two flags.
RUN_LENGTH_MASK = 0x3FFF_FFFF
RUN_FREE = 0x4000_0000
RUN_AFTER_FREE = 0x8000_0000

# --- limits ---------------------------------------------------------------------------------------------------------
MAX_KEY_BYTES = 65_535
STAMP_BITS = 62  # versions begin below 2**61, and never get there
MAX_WAITERS = 1 << 16  # more threads never wait for one lock
SPINS = 100  # looks at a held lock, 1 to 2 us, before a waiter sleeps
PROBE_NS = 1_000_000  # how long one owner is watched before the kernel is asked whether it lives
READ_ATTEMPTS = 8  # then a reader takes the lock
READ_PATIENCE_NS = 50_000_000  # how long it waits for it, while nothing moves, before it calls its key absent
READ_WAITS = 20  # and how often it does so while others change things
CHECK_NS = 250_000_000  # how often an attached process looks whether the files still have names
RUN_BATCH = 4096  # requests performed while the lock is held once, some milliseconds
PURGE_BATCH = 256  # entries removed while the lock is held once
SWEEP = 4  # live entries of the timer wheel that each write looks at, and expired ones that it removes
EVICTION_SWEEP = 256  # live entries of the wheel that an eviction looks at before it takes one of them
EXACT_ORDER_SLOTS = 1024  # up to here every hit moves its entry to the front
LAZY_ORDER_SHIFT = 3  # beyond, only when as many as an eighth of the slots were filled since its last move

# --- what an operation is, and how it ended -------------------------------------------------------------------------
OP_SET = 0
OP_ADD = 1
OP_INCR = 2
OP_REPLACE = 3  # from here on the key must be there
OP_CAS = 4
OP_DELETE = 5
OP_DELETE_VERSION = 6
OP_TOUCH = 7
OP_READ = 8
OP_PURGE = 9
OP_CLEAR = 10
OP_EVICT = 11
OP_READ_SLOT = 12

DONE = 0
ABSENT = 1  # the key was not there
PRESENT = 2  # the key was there and should not have been
CONFLICT = 3  # the version was another one
BUSY = 4  # a read collided too often
NOT_A_NUMBER = 5
OUT_OF_RANGE = 6
CORRUPT = 7
TOO_LARGE = 8
# From here on nothing has been done. The last two want something done without the lock, and then the request again.
UNDONE = 9  # the turn has not come yet
NO_ROOM = 10  # the scratch memory of the request is shorter than the value
FULL = 11  # the cache is, but this shard has next to nothing: another one must evict

POLICIES = {"lru": 0}
PAGE = 4096


class Region(NamedTuple):
    """Word indexes of one shard's parts."""

    header: int
    log: int
    bins: int
    wheel: int
    buckets: int
    slots: int
    blocks: int
    end: int


class Geometry(NamedTuple):
    """Everything fixed at creation: sizes in bytes, counts in units.

    `max_entries` bounds the entries of the whole cache. With several shards each has slots to spare, because a hash
    does not deal keys out evenly; the bound stays the one asked for.
    """

    max_bytes: int
    max_entries: int
    shards: int
    slots: int  # per shard
    blocks: int  # per shard
    processes: int
    eviction: str = "lru"

    @classmethod
    def plan(cls, max_bytes: int, max_entries: int | None, shards: int | None, eviction: str = "lru") -> Geometry:
        """Lay `max_bytes` out; raises ValueError where they do not hold one entry per shard."""
        if shards is None:
            shards = _default_shards(max_bytes, max_entries)
        processes = _processes(max_bytes)
        fixed = HEADER_WORDS + processes * PROCESS_WORDS
        per_shard = (_file_bytes(max_bytes, shards) // 8 - fixed) // shards // 8 * 8 - _fixed_shard_words()
        if max_entries is None:
            # One slot for each 512 bytes: smaller entries run out of slots first, larger ones out of blocks.
            max_entries = max(shards, min(max_bytes // 512, per_shard * shards // 32))
        slots = _slots_per_shard(max_entries, shards)
        words = per_shard - _round8(slots) - slots * SLOT_WORDS
        if words < BLOCK_WORDS:
            needed = _needed_bytes(slots, shards)
            raise ValueError(
                f"max_bytes={max_bytes} is too small for max_entries={max_entries} in {shards} shard(s): "
                f"at least {needed} bytes are needed for the slots, the process table and one block of values each"
            )
        if words // BLOCK_WORDS > RUN_LENGTH_MASK:
            raise ValueError(
                f"max_bytes={max_bytes} in {shards} shard(s): a shard has at most 64 GiB, and a cache {MAX_SHARDS} "
                f"shards, so 4 TiB in all"
            )
        return cls(max_bytes, max_entries, shards, slots, words // BLOCK_WORDS, processes, eviction)

    def region(self, shard: int) -> Region:
        """The place of shard number `shard`."""
        start = HEADER_WORDS + self.processes * PROCESS_WORDS + shard * self._shard_stride()
        log = start + SHARD_WORDS
        bins = log + _round8(1 + 2 * LOG_ENTRIES)
        wheel = bins + _round8(BIN_BITMAP_WORDS + BINS)
        buckets = wheel + WHEEL_LISTS
        slots = buckets + _round8(self.slots)
        blocks = slots + self.slots * SLOT_WORDS
        return Region(start, log, bins, wheel, buckets, slots, blocks, blocks + self.blocks * BLOCK_WORDS)

    @property
    def file_bytes(self) -> int:
        """The size of the segment's file: with the other files of the cache, no more than `max_bytes`."""
        return _file_bytes(self.max_bytes, self.shards)

    @property
    def max_entry_bytes(self) -> int:
        """The most bytes that one key and its value, encoded, may have together."""
        return min(self.blocks * BLOCK_BYTES - RUN_HEADER_BYTES, 0xFFFF_FFFF)  # a slot has 32 bits for the size

    def _shard_stride(self) -> int:
        return _fixed_shard_words() + _round8(self.slots) + self.slots * SLOT_WORDS + self.blocks * BLOCK_WORDS


def _processes(max_bytes: int) -> int:
    return max(MIN_PROCESSES, min(MAX_PROCESSES, max_bytes // 16_384))


def _needed_bytes(slots: int, shards: int) -> int:
    """The least `max_bytes` for this many slots in each of this many shards, with a block for each shard."""
    per_shard = _fixed_shard_words() + _round8(slots) + slots * SLOT_WORDS + BLOCK_WORDS
    needed = 0
    while True:  # a larger cache has a larger process table
        words = HEADER_WORDS + _processes(needed) * PROCESS_WORDS + shards * per_shard
        pages = -(-words * 8 // PAGE) + shards + 1
        if pages * PAGE <= needed:
            return needed
        needed = pages * PAGE


def _file_bytes(max_bytes: int, shards: int) -> int:
    # Whole pages, but for one for each semaphore and one for the lock file, which take a page of memory each.
    return max(0, max_bytes // PAGE - shards - 1) * PAGE


def _fixed_shard_words() -> int:
    return SHARD_WORDS + _round8(1 + 2 * LOG_ENTRIES) + _round8(BIN_BITMAP_WORDS + BINS) + WHEEL_LISTS


def _round8(words: int) -> int:
    return (words + 7) // 8 * 8


def _default_shards(max_bytes: int, max_entries: int | None) -> int:
    # On 32 cores 16 shards do twice what 4 do, and 64 next to nothing more: the lock of the hottest key's is the limit
    # then (benchmarks/model.py). Below 4 MiB or 2,048 entries one costs exact eviction and large values too much.
    shards = 1
    while max_bytes // shards >= 32 * 2**30 and shards < MAX_SHARDS:
        shards *= 2
    while shards < 16 and max_bytes >= shards * 8 * 2**20 and (max_entries is None or max_entries >= shards * 4096):
        shards *= 2
    return shards


def _slots_per_shard(max_entries: int, shards: int) -> int:
    share = -(-max_entries // shards)
    if shards == 1:
        return share
    # Six standard deviations of a binomial share: one cache in 10**9 has a shard that evicts before the cache is full.
    return share + 6 * (int(share**0.5) + 1)
