"""Lists and dicts to msgpack and back without Python code, as far as they are plain: scalars, a few levels deep.

Anything else, what is damaged included, is left to `codec.py`, which knows the rest of msgpack and what to say.
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

__all__ = ["Message", "pack_plain"]

# Keys of dicts that were read lately, each in the place that its bytes lead to: one that is there need not be made and
# hashed again. Whoever has many keys lead to one place has them made each time, no more. They are not interned, for
# Python 3.12 keeps what was interned to its end.
known_keys: list[str] = [""] * KNOWN_KEYS


@cython.cclass
class Message:
    """A message in private memory, `scratch`, of which the bytes before `at` have been read or written.

    What cannot be read moves `at` beyond `end`, where it stays: all that is asked for next is not there.
    """

    __slots__ = ("at", "end", "scratch")

    def __init__(self) -> None:
        self.scratch = memoryview(bytearray(0))
        self.at = self.end = 0

    # --- reading ----------------------------------------------------------------------------------------------------
    def unpack(self, size: cython.ulonglong) -> object:
        """The list or dict that the first `size` bytes are, None if that is left to codec.py."""
        self.at = 0
        self.end = size
        value = self.next_item(0)
        return value if self.at == size and (type(value) is dict or type(value) is list) else None

    def next_item(self, depth: cython.ulonglong) -> object:
        """The value that begins here, `depth` containers deep."""
        mark: cython.ulonglong = read_number(self.scratch, self.at, 1)
        width: cython.ulonglong
        signed: cython.longlong
        if self.at >= self.end:
            self.give_up()
            return None
        self.at += 1
        if mark < 0x80:
            return mark
        if mark < 0x90:
            return self.next_dict(mark & 15, depth)
        if mark < 0xA0:
            return self.next_list(mark & 15, depth)
        if mark < 0xC0:
            return self.next_text(mark & 31)
        if mark >= 0xE0:
            return as_signed(wrap(mark - 256))
        if 0xCC <= mark <= 0xCF:
            return self.next_number(1 << (mark - 0xCC))
        if mark == 0xC0:
            return None
        if mark == 0xC2 or mark == 0xC3:
            return mark == 0xC3
        if mark == 0xCB:
            return bits_float(self.next_number(8))
        if 0xC4 <= mark <= 0xC6:
            return self.next_bytes(self.next_number(1 << (mark - 0xC4)))
        if 0xD0 <= mark <= 0xD3:
            width = 1 << (mark - 0xD0)
            signed = as_signed(wrap(self.next_number(width) << (64 - 8 * width)))
            signed >>= 64 - 8 * width  # copies the sign downwards
            return signed
        if 0xD9 <= mark <= 0xDB:
            return self.next_text(self.next_number(1 << (mark - 0xD9)))
        if mark == 0xDC or mark == 0xDD:
            return self.next_list(self.next_number(2 << (mark - 0xDC)), depth)
        if mark == 0xDE or mark == 0xDF:
            return self.next_dict(self.next_number(2 << (mark - 0xDE)), depth)
        self.give_up()  # an extension, or a float of 32 bits
        return None

    def next_list(self, count: cython.ulonglong, depth: cython.ulonglong) -> object:
        """The `count` values that follow, in a list."""
        place: cython.ulonglong = 0
        if depth == PLAIN_DEPTH or self.at + count > self.end:
            self.give_up()
            return None
        items: list[Any] = [None] * count
        while place < count and self.at <= self.end:
            items[place] = self.next_item(depth + 1)
            place += 1
        return items

    def next_dict(self, count: cython.ulonglong, depth: cython.ulonglong) -> object:
        """The `count` pairs that follow, in a dict."""
        items: dict[Any, Any] = {}
        if depth == PLAIN_DEPTH:
            self.give_up()
            return None
        while count and self.at <= self.end:
            key = self.next_key()
            items[key] = self.next_item(depth + 1)
            count -= 1
        return items

    def next_key(self) -> object:
        """The key of a dict that begins here."""
        mark: cython.ulonglong = read_number(self.scratch, self.at, 1)
        if self.at < self.end:
            if 0xA0 <= mark < 0xC0:
                self.at += 1
                return self.next_known(mark & 31)
            if mark == 0xD9:
                self.at += 1
                return self.next_known(self.next_number(1))
        return self.next_item(PLAIN_DEPTH)  # so deep that there are no containers, which are no keys

    def next_known(self, size: cython.ulonglong) -> object:
        """The str whose UTF-8 the next `size` bytes are, from among the known keys or to be one of them."""
        if self.at + size > self.end:
            self.give_up()
            return None
        start: cython.p_uchar = pointer(self.scratch, self.at, size)
        place: cython.ulonglong = key_hash(start, size, 0, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9) % KNOWN_KEYS
        known: str = known_keys[place]
        if cython.cast(cython.ulonglong, text_size(known)) == size and same_bytes(
            self.scratch, self.at, text_pointer(known), size
        ):
            self.at += size
            return known
        text = self.next_text(size)
        if text is not None:
            known_keys[place] = text
        return text

    def next_text(self, size: cython.ulonglong) -> Any:
        """The str whose UTF-8 the next `size` bytes are."""
        start: cython.ulonglong = self.at
        self.at += size
        if self.at > self.end:
            return None
        text = make_text(self.scratch, start, size)
        if text is None:
            self.give_up()
        return text

    def next_bytes(self, size: cython.ulonglong) -> object:
        """The next `size` bytes."""
        start: cython.ulonglong = self.at
        self.at += size
        return make_bytes(self.scratch, start, size) if self.at <= self.end else None

    def next_number(self, width: cython.ulonglong) -> int:
        """The next `width` bytes as a number."""
        start: cython.ulonglong = self.at
        self.at += width
        return read_number(self.scratch, start, width) if self.at <= self.end else 0

    def give_up(self) -> None:
        self.at = self.end + 1

    # --- writing: no Python code runs meanwhile, so that what is written stays as it is -------------------------------
    def pack(self, value: object) -> bytes | None:
        """A list or dict as bytes, None if that is left to codec.py."""
        status: cython.int = NO_ROOM
        try:
            self.at = 0
            status = self.put(value, 0)
            while status == NO_ROOM and len(self.scratch) < MAX_PLAIN:
                # Making memory may run a finalizer that packs something here: begin again.
                self.scratch = memoryview(bytearray(max(4 * len(self.scratch), SCRATCH)))
                self.at = 0
                status = self.put(value, 0)
        except UnicodeEncodeError:
            return None  # a lone surrogate
        return make_bytes(self.scratch, 0, self.at) if status == DONE else None

    def put(self, value: Any, depth: cython.ulonglong) -> int:
        """Append `value`, which lies `depth` containers deep: DONE, NO_ROOM, or UNDONE for what is not plain."""
        kind = type(value)
        if kind is str:
            return self.put_text(value)
        if kind is int:
            return self.put_integer(value) if is_long_long(value) else UNDONE
        if kind is dict:
            return self.put_dict(value, depth)
        if kind is list:
            return self.put_list(value, depth)
        if value is None:
            return self.put_mark(0xC0, 0, 0)
        if kind is bool:
            return self.put_mark(0xC3 if value else 0xC2, 0, 0)
        if kind is float:
            return self.put_mark(0xCB, float_bits(value), 8)
        if kind is bytes:
            return self.put_bytes(value)
        return UNDONE

    def put_dict(self, items: dict[Any, Any], depth: cython.ulonglong) -> int:
        status: cython.int = self.put_size(0x80, 16, 0, 0xDE, len(items)) if depth < PLAIN_DEPTH else UNDONE
        for key, value in items.items():
            if status == DONE:
                status = self.put(key, PLAIN_DEPTH)
            if status == DONE:
                status = self.put(value, depth + 1)
            if status != DONE:
                break
        return status

    def put_list(self, items: list[Any], depth: cython.ulonglong) -> int:
        status: cython.int = self.put_size(0x90, 16, 0, 0xDC, len(items)) if depth < PLAIN_DEPTH else UNDONE
        for item in items:
            if status != DONE:
                break
            status = self.put(item, depth + 1)
        return status

    def put_text(self, text: str) -> int:
        """Raises UnicodeEncodeError for a lone surrogate."""
        size: cython.ulonglong = text_size(text)
        status: cython.int = self.put_size(0xA0, 32, 0xD9, 0xDA, size)
        return self.put_body(text_pointer(text), size) if status == DONE else status

    def put_bytes(self, data: bytes) -> int:
        size: cython.ulonglong = bytes_size(data)
        status: cython.int = self.put_size(0, 0, 0xC4, 0xC5, size)
        return self.put_body(bytes_pointer(data), size) if status == DONE else status

    def put_body(self, start: cython.p_uchar, size: cython.ulonglong) -> int:
        if not copy_in(self.scratch, self.at, start, size):
            return NO_ROOM
        self.at += size
        return DONE

    def put_integer(self, value: cython.longlong) -> int:
        if -32 <= value < 128:
            return self.put_mark(value & 0xFF, 0, 0)
        if value >= 0:
            if value < 0x100:
                return self.put_mark(0xCC, value, 1)
            if value < 0x10000:
                return self.put_mark(0xCD, value, 2)
            if value < 0x1_0000_0000:
                return self.put_mark(0xCE, value, 4)
            return self.put_mark(0xCF, value, 8)
        if value >= -0x80:
            return self.put_mark(0xD0, wrap(value), 1)
        if value >= -0x8000:
            return self.put_mark(0xD1, wrap(value), 2)
        if value >= -0x8000_0000:
            return self.put_mark(0xD2, wrap(value), 4)
        return self.put_mark(0xD3, wrap(value), 8)

    def put_size(
        self,
        fixed: cython.ulonglong,
        below: cython.ulonglong,
        mark_8: cython.ulonglong,
        mark_16: cython.ulonglong,
        size: cython.ulonglong,
    ) -> int:
        """Append a mark with a size: in the mark `fixed` itself if it is `below` that, or else in 1, 2 or 4 bytes."""
        if size < below:
            return self.put_mark(fixed | size, 0, 0)
        if mark_8 and size < 0x100:
            return self.put_mark(mark_8, size, 1)
        if size < 0x10000:
            return self.put_mark(mark_16, size, 2)
        return self.put_mark(mark_16 + 1, size, 4)  # more than 4 GiB find no room anyway

    def put_mark(self, mark: cython.ulonglong, number: cython.ulonglong, width: cython.ulonglong) -> int:
        written: cython.ulonglong = write_number(self.scratch, self.at, mark, number, width)
        self.at += written
        return DONE if written else NO_ROOM


_packer = Message()


def pack_plain(value: object) -> bytes | None:
    """A list or dict as one message, None if that is left to codec.py; uncompiled, the msgpack library is faster."""
    return _packer.pack(value) if cython.compiled else None
