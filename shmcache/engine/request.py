"""One operation on one key, from its arguments to its result: what the store hands to a shard and gets back.

Python objects become bytes here, and bytes Python objects. The commonest ones take no way through Python code.
"""

from __future__ import annotations

import contextlib
from typing import Any

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

if cython.compiled:
    from cython.cimports.shmcache.engine.keys import TuplePacker
    from cython.cimports.shmcache.engine.layout import *
    from cython.cimports.shmcache.engine.message import Message
    from cython.cimports.shmcache.engine.primitives import *
else:
    from shmcache.engine.keys import TuplePacker
    from shmcache.engine.layout import *
    from shmcache.engine.message import Message
    from shmcache.engine.primitives import *

from shmcache.codec import decode_key, encode_key
from shmcache.errors import KeyTooLarge, SerializationError, ValueTooLarge, contradiction

__all__ = ["Request"]


@cython.final
@cython.cclass
class Request(Message):
    """A scratch record that the store reuses, so that an operation allocates nothing but its result.

    `key` and `body` point into `key_object`, `body_object` or `small`, which keep the memory alive; run uncompiled they
    are the bytes themselves. A value is its head, in `small` from HEAD_AT on (a msgpack header, or all of a number),
    and its body. On the way out its copy is in `scratch`, which is `room` bytes long at least if a read said so; or, if
    `is_whole`, in `whole`, all but the first `skip` bytes, which are in `small` (`Reader.copy_whole` says of which).
    """

    # fmt: off
    # Uncompiled: of more than 30 attributes each object has a dict of its own, of 1.5 KB. (`scratch` is Message's.)
    __slots__ = (  # noqa: RUF023
        "op", "status", "key_object", "body_object", "packer", "small_memory", "small", "scratch_memory",
        "whole", "key_size", "key_kind", "hash", "head_size", "body_size", "value_size", "room", "skip", "expiry",
        "version", "slot", "now", "refusals", "given_up", "number", "initial", "in_use", "is_whole", "keep_expiry",
        "has_initial", "wants_value", "key", "body",
    )
    # fmt: on

    def __init__(self) -> None:
        self.op = self.status = 0
        self.key_object: object = None
        self.body_object: object = None
        self.packer: TuplePacker | None = None
        self.small_memory = bytearray(32)
        self.small = memoryview(self.small_memory)
        self.scratch_memory = bytearray(0)  # most writes need none
        self.scratch = memoryview(self.scratch_memory)
        self.at = self.end = 0  # as Message has it: to have it make its own would be a sixth of a set_many
        self.whole: Any = None
        self.key_size = self.key_kind = self.hash = 0
        self.head_size = self.body_size = self.value_size = self.room = self.skip = 0
        self.expiry = self.version = self.slot = self.now = 0
        self.refusals = 0
        self.given_up = 0  # a bit for each shard whose lock a read could not have
        self.number = self.initial = 0
        self.in_use = self.is_whole = False
        self.keep_expiry = self.has_initial = False
        self.wants_value = True
        if not cython.compiled:
            self.key = self.body = b""

    def make_room(self) -> int:
        """Make `scratch` at least `room` bytes long; its contents are lost."""
        if size_of(self.scratch) < self.room:
            self.scratch_memory = bytearray(max(self.room, SCRATCH))
            self.scratch = memoryview(self.scratch_memory)
        return 0

    def release(self) -> None:
        """Let go of the objects of the operation before, and of a scratch that grew large."""
        self.is_whole = False
        self.key_object = self.body_object = self.whole = None
        self.given_up = 0
        if len(self.scratch) > 1_048_576:
            self.scratch_memory = bytearray(SCRATCH)
            self.scratch = memoryview(self.scratch_memory)
        self.in_use = False  # last: making memory may run a finalizer, which would be given this request

    # --- keys -------------------------------------------------------------------------------------------------------
    def set_key(self, key: object) -> int:
        """Fill in the key's bytes; a kind tells str, bytes and everything else apart."""
        if type(key) is str:
            if is_ascii(key):  # whose memory is UTF-8, with nothing that could fail
                self.key_size = ascii_size(key)
                self.key = ascii_pointer(key)
            else:
                self.set_wide_key(key)
            self.key_kind = KEY_TEXT
            self.key_object = key
        elif type(key) is bytes:
            self.key_size = bytes_size(key)
            self.key = bytes_pointer(key)
            self.key_kind = KEY_BYTES
            self.key_object = key
        elif type(key) is int and is_long_long(key):
            self.key_size = write_number(self.small, 0, 0xD3, wrap(cython.cast(cython.longlong, key)), 8)
            self.key = pointer(self.small, 0, self.key_size)
            self.key_kind = KEY_PACKED
        elif type(key) is tuple and self.own_packer().pack(key):
            self.set_packed_key()
        else:
            packed: bytes = encode_key(key)
            self.key_size = bytes_size(packed)
            self.key = bytes_pointer(packed)
            self.key_kind = KEY_PACKED
            self.key_object = packed
        if self.key_size > MAX_KEY_BYTES:
            raise KeyTooLarge(f"a key has at most {MAX_KEY_BYTES:,} bytes, this one has {self.key_size:,}: hash it")
        return 0

    def own_packer(self) -> TuplePacker:
        if self.packer is None:
            self.packer = TuplePacker()
        return self.packer

    def set_packed_key(self) -> None:
        packer: TuplePacker = self.own_packer()
        self.key_size = packer.size
        self.key = pointer(packer.room, packer.start, packer.size)
        self.key_kind = KEY_PACKED

    def set_wide_key(self, key: str) -> int:
        try:
            self.key_size = text_size(key)
        except UnicodeEncodeError as error:
            raise SerializationError(f"the key {key!r} has no UTF-8 form ({error.reason}): use bytes") from None
        self.key = text_pointer(key)
        return 0

    def found_key(self) -> object:
        """The key at the beginning of `scratch`."""
        if self.key_kind == KEY_TEXT:
            text = make_text(self.scratch, 0, self.key_size)
            if text is None:
                raise contradiction()
            return text
        if self.key_kind == KEY_PACKED and self.key_size == 9 and read_number(self.scratch, 0, 1) == 0xD3:
            return as_signed(read_number(self.scratch, 1, 8))
        data = make_bytes(self.scratch, 0, self.key_size)
        return data if self.key_kind == KEY_BYTES else decode_key(data)

    # --- values: msgpack, scalars here, plain lists and dicts by `message.py`, everything else by the codec -----------
    def set_value(self, value: Any, codec: Any) -> int:
        """Fill in the value's head and body."""
        self.body_size = 0
        self.keep_expiry = False
        kind = type(value)
        if kind is str:
            self.set_text(value)
        elif kind is bytes:
            self.set_bytes(value)
        elif kind is int and is_long_long(value):
            self.set_integer(value)
        elif kind is float:
            self.head_size = write_number(self.small, HEAD_AT, 0xCB, float_bits(value), 8)
        elif value is None:
            self.head_size = write_number(self.small, HEAD_AT, 0xC0, 0, 0)
        elif kind is bool:
            self.head_size = write_number(self.small, HEAD_AT, 0xC3 if value else 0xC2, 0, 0)
        else:
            packed: bytes = codec.encode(value)
            self.body_object = packed
            self.body = bytes_pointer(packed)
            self.body_size = bytes_size(packed)
            self.head_size = 0
        return 0

    def set_text(self, value: str) -> int:
        size: cython.ulonglong
        try:
            size = text_size(value)
        except UnicodeEncodeError as error:
            raise SerializationError(
                f"the value is a str without a UTF-8 form ({error.reason} at position {error.start}): store bytes"
            ) from None
        self.body_object = value
        self.body = text_pointer(value)
        self.body_size = size
        if size < 32:
            self.head_size = write_number(self.small, HEAD_AT, 0xA0 | size, 0, 0)
        elif size < 0x100:
            self.head_size = write_number(self.small, HEAD_AT, 0xD9, size, 1)
        elif size < 0x10000:
            self.head_size = write_number(self.small, HEAD_AT, 0xDA, size, 2)
        else:
            self.head_size = write_number(self.small, HEAD_AT, 0xDB, _below_4_gib(size), 4)
        return 0

    def set_bytes(self, value: bytes) -> int:
        size: cython.ulonglong = bytes_size(value)
        self.body_object = value
        self.body = bytes_pointer(value)
        self.body_size = size
        if size < 0x100:
            self.head_size = write_number(self.small, HEAD_AT, 0xC4, size, 1)
        elif size < 0x10000:
            self.head_size = write_number(self.small, HEAD_AT, 0xC5, size, 2)
        else:
            self.head_size = write_number(self.small, HEAD_AT, 0xC6, _below_4_gib(size), 4)
        return 0

    def set_integer(self, value: cython.longlong) -> None:
        if -32 <= value < 128:
            self.head_size = write_number(self.small, HEAD_AT, value & 0xFF, 0, 0)
        elif -0x80 <= value < 0x80:
            self.head_size = write_number(self.small, HEAD_AT, 0xD0, wrap(value), 1)
        elif -0x8000 <= value < 0x8000:
            self.head_size = write_number(self.small, HEAD_AT, 0xD1, wrap(value), 2)
        elif -0x8000_0000 <= value < 0x8000_0000:
            self.head_size = write_number(self.small, HEAD_AT, 0xD2, wrap(value), 4)
        else:
            self.head_size = write_number(self.small, HEAD_AT, 0xD3, wrap(value), 8)

    def value(self, codec: Any) -> object:
        """The value whose copy the request has; what is not well-formed is left to codec.py to refuse."""
        size: cython.ulonglong = self.value_size
        mark: cython.ulonglong
        number: cython.longlong
        width: cython.ulonglong
        text: object
        if self.is_whole:
            return self.large_value(codec)
        mark = read_number(self.scratch, 0, 1)
        if 0xA0 <= mark < 0xC0 and size == 1 + (mark & 31):
            text = make_text(self.scratch, 1, size - 1)
            if text is not None:
                return text
        elif 0xD9 <= mark <= 0xDB:
            width = 1 << (mark - 0xD9)
            if size == 1 + width + read_number(self.scratch, 1, width):
                text = make_text(self.scratch, 1 + width, size - 1 - width)
                if text is not None:
                    return text
        elif 0xC4 <= mark <= 0xC6:
            width = 1 << (mark - 0xC4)
            if size == 1 + width + read_number(self.scratch, 1, width):
                return make_bytes(self.scratch, 1 + width, size - 1 - width)
        elif 0x80 <= mark < 0xA0 or 0xDC <= mark <= 0xDF:
            if cython.compiled:  # else the msgpack library is faster
                value = self.unpack(size)
                if value is not None:
                    return value
        elif size == 1:
            if mark < 0x80:
                return mark
            if mark >= 0xE0:
                return as_signed(wrap(mark - 256))
            if mark == 0xC0:
                return None
            if mark == 0xC2 or mark == 0xC3:
                return mark == 0xC3
        elif mark == 0xCB and size == 9:
            return bits_float(read_number(self.scratch, 1, 8))
        elif 0xD0 <= mark <= 0xD3 and size == 1 + (1 << (mark - 0xD0)):
            width = 64 - 8 * (size - 1)
            number = as_signed(wrap(read_number(self.scratch, 1, size - 1) << width))
            number >>= width  # copies the sign downwards
            return number
        return codec.decode(make_bytes(self.scratch, 0, size))

    def large_value(self, codec: Any) -> object:
        """`value` where the copy is a bytes object: the value itself, if that is bytes."""
        whole: bytes = finished(self.whole)
        head: cython.ulonglong = self.skip
        mark: cython.ulonglong = read_number(self.small, HEAD_AT, 1)
        self.whole = None
        self.is_whole = False
        if self.skip:
            if head + read_number(self.small, HEAD_AT + 1, head - 1) == self.value_size:
                return whole
            return codec.decode(make_bytes(self.small, HEAD_AT, head) + whole)
        if 0xD9 <= mark <= 0xDB:
            head = 1 + (1 << (mark - 0xD9))
            if head + read_number(self.small, HEAD_AT + 1, head - 1) == self.value_size:
                with contextlib.suppress(UnicodeDecodeError):
                    return str(memoryview(whole)[head:], "utf-8")
        return codec.decode(whole)


def _below_4_gib(size: int) -> int:
    if size >> 32:
        raise ValueTooLarge(f"a value has less than 4 GiB, this one has {size:,} bytes: split it")
    return size
