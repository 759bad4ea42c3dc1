"""Keys that are tuples, packed without a way through Python code: the bytes are those of `codec.encode_key`.

That function says what a key is and what its bytes are; this one knows the common ones, flat and short, and leaves
every other to it, those that are refused included.
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

__all__ = ["TuplePacker"]


@cython.final
@cython.cclass
class TuplePacker:
    """Packs into `room`, which is reused: what was packed is `size` bytes from `start` on."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(TUPLE_ROOM))
        self.start = self.size = 0

    def pack(self, key: tuple[Any, ...]) -> bool:
        """Pack `key`; False if it is not one of the common ones."""
        return self.begin(len(key)) and self.add_all(key, 0) and self.finish()

    def pack_call(
        self,
        count: cython.ulonglong,
        packed: bytes,
        args: tuple[Any, ...],
        tail: tuple[Any, ...],
        first: cython.longlong,
    ) -> bool:
        """Pack a key of `count` parts: those that `packed` is the bytes of, then `args` and `tail[first:]`."""
        size: cython.ulonglong = bytes_size(packed)
        if not self.begin(count) or not copy_in(self.room, TUPLE_AT + 1, bytes_pointer(packed), size):
            return False
        self.size += size
        return self.add_all(args, 0) and self.add_all(tail, first) and self.finish()

    def begin(self, count: cython.ulonglong) -> bool:
        """Write the head of the array; `size` is what has been written from TUPLE_AT on."""
        self.size = 1
        return count < 16 and write_number(self.room, TUPLE_AT, 0x90 | count, 0, 0) != 0

    def finish(self) -> bool:
        """Write the header of the extension, in front of the array that is its payload."""
        size: cython.ulonglong = self.size
        if size == 1 or size == 2 or size == 4 or size == 8 or size == 16:
            self.start = TUPLE_AT - 2
            write_number(self.room, self.start, 0xD4 + highest_bit(size), TUPLE, 1)
        else:
            self.start = TUPLE_AT - 3
            write_number(self.room, self.start, 0xC7, size << 8 | TUPLE, 2)
        self.size = TUPLE_AT + size - self.start
        return True

    def add_all(self, parts: tuple[Any, ...], first: cython.longlong) -> bool:
        """Write the parts from number `first` on; False if there is one that is not common, or no room."""
        number: cython.longlong
        size: cython.ulonglong
        for number in range(first, len(parts)):
            size = self.add(TUPLE_AT + self.size, parts[number])
            if not size:
                return False
            self.size += size
        return True

    def add(self, at: cython.ulonglong, part: Any) -> int:
        """Write one part; its size, 0 if it is not one of the common ones, or there is no room for it."""
        kind = type(part)
        head: cython.ulonglong
        size: cython.ulonglong
        if kind is str:
            try:
                size = text_size(part)
            except UnicodeEncodeError:
                return 0
            if size < 32:
                head = write_number(self.room, at, 0xA0 | size, 0, 0)
            else:
                head = write_number(self.room, at, 0xD9, size, 1)  # there is no room for 256 bytes
            return head + size if head and copy_in(self.room, at + head, text_pointer(part), size) else 0
        if kind is int:
            return self.add_integer(at, part) if is_long_long(part) else 0
        if kind is bytes:
            size = bytes_size(part)
            head = write_number(self.room, at, 0xC4, size, 1)
            return head + size if head and copy_in(self.room, at + head, bytes_pointer(part), size) else 0
        if part is None:
            return write_number(self.room, at, 0xC0, 0, 0)
        if kind is bool:
            return write_number(self.room, at, 0xC3 if part else 0xC2, 0, 0)
        if kind is float and part == part:  # NaN is no key
            return write_number(self.room, at, 0xCB, float_bits(part + 0.0), 8)  # -0.0 and 0.0 are one key
        return 0

    def add_integer(self, at: cython.ulonglong, number: cython.longlong) -> int:
        """Write an int in as few bytes as msgpack has for it; how many they are."""
        if -0x20 <= number < 0x80:
            return write_number(self.room, at, number & 0xFF, 0, 0)
        if number >= 0:
            if number < 0x100:
                return write_number(self.room, at, 0xCC, wrap(number), 1)
            if number < 0x10000:
                return write_number(self.room, at, 0xCD, wrap(number), 2)
            if number < 0x1_0000_0000:
                return write_number(self.room, at, 0xCE, wrap(number), 4)
            return write_number(self.room, at, 0xCF, wrap(number), 8)
        if number >= -0x80:
            return write_number(self.room, at, 0xD0, wrap(number), 1)
        if number >= -0x8000:
            return write_number(self.room, at, 0xD1, wrap(number), 2)
        if number >= -0x8000_0000:
            return write_number(self.room, at, 0xD2, wrap(number), 4)
        return write_number(self.room, at, 0xD3, wrap(number), 8)
