"""The raw operations on the segment, in plain Python; `primitives.pxd` has the same names as inline C.

Nothing above this file touches a word or a byte of the segment in any other way. An index outside of it reads 0 and
stores nothing, in both bodies. A word goes in and out through a `memoryview` cast to `Q`, which CPython copies whole;
`struct.pack_into` would write it byte by byte.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import threading
import time
from typing import Any

from shmcache.engine.layout import L_ENTRIES, LOG_ENTRIES

ATOMIC_BYTE = (1 << 20) + 1  # of the lock file: held for a compare-and-swap
MASK = 0xFFFF_FFFF_FFFF_FFFF
HALF = 0xFFFF_FFFF
NOWHERE = 1 << 60  # beyond every segment, as the index of a word and, times 8, of a byte


# --- words ----------------------------------------------------------------------------------------------------------
def load(words: memoryview, index: int) -> int:
    return int(words[index]) if 0 <= index < len(words) else 0


load_acquire = load_seq_cst = load


def store(words: memoryview, index: int, value: int) -> None:
    if 0 <= index < len(words):
        words[index] = value & MASK


store_release = store_seq_cst = store


def record(first: int, size: int, number: int, count: int) -> int:
    """The word index of one of `count` records of `size` words; of no word at all for a number out of their range."""
    return first + number * size if 0 <= number < count else NOWHERE


def logged_store(words: memoryview, log: int, index: int, value: int) -> None:
    """Store `value` at `index`, but first append (index, old value) to the undo log whose first word is `log`."""
    used = load(words, log)
    if not 0 <= index < len(words) or used >= LOG_ENTRIES:
        return
    entry = log + L_ENTRIES + 2 * used
    store(words, entry, index)
    store(words, entry + 1, words[index])
    store(words, log, used + 1)
    store(words, index, value)


def compare_and_swap(words: memoryview, index: int, old: int, new: int, guard: Any) -> bool:
    """Store `new` where `old` is. A `bytelock.Guard` makes that atomic among all processes; C has an instruction."""
    mutex = guard.mutex
    mutex.refuse_reentry()
    with mutex.lock:
        if guard.fd < 0:
            return False  # closed by another thread
        try:
            mutex.owner = threading.get_ident()
            if not guard.take() or load(words, index) != old:
                return False
            store(words, index, new)
            return True
        finally:
            # Calls of C functions only: no signal handler runs before they are done.
            try:  # noqa: SIM105
                fcntl.lockf(guard.fd, fcntl.LOCK_UN, 1, ATOMIC_BYTE)
            except (OSError, ValueError):
                pass  # closed, and so unlocked
            mutex.owner = 0


def fence_acquire() -> None:
    """Loads before it come before loads after it. Python code is slow enough on every machine it runs on (x86, arm64:
    each bytecode passes through locks and calls), and a torn read is caught by the version all the same."""


fence_release = fence_acquire


def pause() -> None:
    """Tell the CPU that this is a spin loop."""


# --- fields of a word -----------------------------------------------------------------------------------------------
def low(word: int) -> int:
    return word & HALF


def high(word: int) -> int:
    return word >> 32


def pack(high: int, low: int) -> int:
    return high << 32 | low


def with_low(word: int, low: int) -> int:
    return word & ~HALF | low


def with_high(word: int, high: int) -> int:
    return word & HALF | high << 32


def wrap(number: int) -> int:
    """`number` modulo 2**64: C wraps, Python grows."""
    return number & MASK


def as_signed(word: int) -> int:
    """A word as a two's complement number."""
    return word - (1 << 64) if word >> 63 else word


def add_overflows(a: int, b: int) -> bool:
    return not -(1 << 63) <= a + b < 1 << 63


def bit(position: int) -> int:
    return 1 << position


def highest_bit(word: int) -> int:
    return word.bit_length() - 1 if word else 0


def lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1 if word else 64


# --- bytes ----------------------------------------------------------------------------------------------------------
size_of = len


def copy_in(data: memoryview, at: int, source: bytes, size: int) -> bool:
    if at + size > len(data):
        return False
    data[at : at + size] = source[:size]
    return True


def copy(target: memoryview, at: int, source: memoryview, start: int, size: int) -> bool:
    if at + size > len(target) or start + size > len(source):
        return False
    target[at : at + size] = source[start : start + size]
    return True


def prefetch(data: memoryview, at: int, size: int) -> None:
    """Ask the processor to fetch these bytes while it does something else."""


def same_bytes(data: memoryview, at: int, other: bytes, size: int) -> bool:
    return at + size <= len(data) and data[at : at + size] == other[:size]


def pointer(data: memoryview, at: int, size: int) -> bytes:
    """The `size` bytes at `at`; in C a pointer, valid while `data` lives."""
    return bytes(data[at : at + size])


def advance(start: bytes, by: int) -> bytes:
    return start[by:]


def write_number(data: memoryview, at: int, mark: int, value: int, size: int) -> int:
    """Write `mark` and `value` as `size` bytes, most significant first; the number of bytes written, 0 for no room."""
    if at + 1 + size > len(data):
        return 0
    data[at] = mark
    data[at + 1 : at + 1 + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")
    return size + 1


def read_number(data: memoryview, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big") if at + size <= len(data) else 0


def float_bits(value: float) -> int:
    return int.from_bytes(struct.pack(">d", value), "big")


def bits_float(bits: int) -> float:
    return float(struct.unpack(">d", bits.to_bytes(8, "big"))[0])


# --- Python objects -------------------------------------------------------------------------------------------------
def is_ascii(text: str) -> bool:
    return text.isascii()


ascii_size = len


def ascii_pointer(text: str) -> bytes:
    return text.encode()


def text_pointer(text: str) -> bytes:
    """The UTF-8 of `text`; raises UnicodeEncodeError for a lone surrogate."""
    return text.encode()


def text_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def is_long_long(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def bytes_pointer(data: bytes) -> bytes:
    return data


def bytes_size(data: bytes) -> int:
    return len(data)


def new_bytes(size: int) -> bytearray | None:
    """What is to become a bytes object once it is filled, None for want of memory."""
    try:
        return bytearray(size)
    except MemoryError:
        return None


def fill(target: bytearray, at: int, source: memoryview, start: int, size: int) -> bool:
    """Copy to a bytearray, or to what `new_bytes` gave, which nobody else has seen yet."""
    if at + size > len(target) or start + size > len(source):
        return False
    target[at : at + size] = source[start : start + size]
    return True


def finished(made: bytearray) -> bytes:
    """The bytes object that `new_bytes` began."""
    return bytes(made)


def make_text(data: memoryview, at: int, size: int) -> str | None:
    """The str whose UTF-8 these bytes are, None if they are not UTF-8."""
    try:
        return str(data[at : at + size], "utf-8")
    except UnicodeDecodeError:
        return None


def make_bytes(data: memoryview, at: int, size: int) -> bytes:
    return bytes(data[at : at + size])


# --- hash, clock, process -------------------------------------------------------------------------------------------
def key_hash(key: bytes, size: int, kind: int, secret0: int, secret1: int) -> int:
    """A keyed 64-bit hash of the folded-multiply family (wyhash by Wang Yi, rapidhash by Nicolas De Carli).

    No way is known to choose keys that collide without the 128 secret bits. Both factors of a product depend on them: a
    key that met a public one would make the product zero. The kind goes in last, beside the size: xored to the seed, it
    would cancel with the like difference of a key, whatever the secret.
    """
    seed = secret0
    at = 0
    while size - at > 16:
        seed = _fold(_word(key, at, 8) ^ secret1, _word(key, at + 8, 8) ^ seed)
        at += 16
    left = size - at
    a = b = 0
    if left >= 8:
        a, b = _word(key, at, 8), _word(key, size - 8, 8)
    elif left >= 4:
        a, b = _word(key, at, 4), _word(key, size - 4, 4)
    elif left > 0:
        a = key[at] << 16 | key[at + (left >> 1)] << 8 | key[size - 1]
    return _fold(secret0 ^ (size | kind << 16), _fold(a ^ secret1, b ^ seed))


def _fold(a: int, b: int) -> int:
    product = a * b
    return (product ^ product >> 64) & MASK


def _word(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], sys.byteorder)


def now_ns() -> int:
    """The system-wide monotonic clock, ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def precise_ns() -> int:
    """The same clock, read precisely; by a name that libraries which freeze time for tests leave alone."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def watch_forks() -> None:
    """Begin to count forks; in C the handler also sees forks that Python's hooks do not, such as uWSGI's."""


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def process_epoch() -> int:
    """A number that is another one in a forked child: a hook may not run, and in another namespace pids repeat."""
    return _forks << 32 | os.getpid()
