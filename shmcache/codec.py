"""Values and keys to msgpack bytes and back: a type comes back as the type it was, or it is refused.

What msgpack has no type for is an extension, numbered in `Extension`; the payload of each is described there, so that
another language can read it. Containers are done here, all else in `extensions.py`. Bytes are never trusted: whatever
they hold, decoding gives a value or raises `SerializationError`, and pickled bytes are loaded by a codec that was made
with "pickle" only.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from itertools import chain
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType
from typing import Any, Final, Protocol

import msgpack  # type: ignore[import-untyped, unused-ignore]

from shmcache.engine.message import pack_plain
from shmcache.errors import SerializationError

__all__ = ["MAX_NESTING", "Codec", "Extension", "Serializer", "decode_key", "encode_key"]

MAX_NESTING: Final = 64
"""How many containers deep a value may be, unless it is lists, dicts and scalars only: those go as deep as msgpack."""


class Extension(IntEnum):
    """The msgpack extension codes in use, each with its payload. A code never changes its meaning."""

    TUPLE = 1  # a msgpack array
    SET = 2  # a msgpack array, in any order
    FROZENSET = 3  # a msgpack array, in any order
    BYTEARRAY = 4  # the bytes
    BIG_INT = 5  # an int beyond 64 bits: two's complement, big-endian, as short as it goes
    COMPLEX = 6  # two big-endian doubles: real, imaginary
    DECIMAL = 7  # its text, ASCII
    UUID = 8  # the 16 bytes, in the order of the text form
    DATETIME = 9  # array: year, month, day, hour, minute, second, microsecond, fold, zone
    DATE = 10  # array: year, month, day
    TIME = 11  # array: hour, minute, second, microsecond, fold, zone
    TIMEDELTA = 12  # array: days, seconds, microseconds
    NUMPY_ARRAY = 13  # header length (32 bits, big-endian), header (array: dtype, "C" or "F", shape), the items
    NUMPY_SCALAR = 14  # as NUMPY_ARRAY, the shape empty
    NUMPY_STR = 15  # UTF-8
    NUMPY_BYTES = 16  # the bytes
    PICKLE = 32  # a pickle
    SERIALIZER = 33  # whatever the serializer of the application wrote
    # A zone is nil (naive), an IANA key, or an array: offset from UTC in microseconds, name or nil.
    # A dtype is numpy's `dtype.str`, or for a structured one its `dtype.descr`.


class Serializer(Protocol):
    """What `Codec` takes in place of a name: any object with these two methods, a module such as `pickle` included."""

    def dumps(self, obj: Any, /) -> bytes:
        """Return `obj` as bytes."""

    def loads(self, data: bytes, /) -> Any:
        """Return the object that `dumps` was given."""


class Codec:
    """Turns values into msgpack bytes and back; one may be shared by any number of threads.

    `serializer` is "msgpack" (the default), "pickle", or an object with `dumps(obj) -> bytes` and
    `loads(bytes) -> obj`. With the last two, str, bytes, int, float, bool and None are still written as msgpack, and
    every other value is one extension with what the serializer wrote.

    Raises ValueError for an unknown name, TypeError for an object without the two methods.
    """

    __slots__ = ("_dumps", "_foreign", "_loads", "_revive_outermost", "_revivers", "serializer")

    def __init__(self, serializer: str | Serializer = "msgpack") -> None:
        self.serializer: Final = serializer
        self._foreign: Extension | None = None
        self._dumps: Callable[[Any], bytes]
        self._loads: Callable[[bytes], Any]
        # The hook for each depth: how deep a payload lies needs no counter that threads would share.
        self._revivers: Final = tuple(partial(self._revive, depth) for depth in range(MAX_NESTING + 1))
        self._revive_outermost: Final = self._revivers[0]
        if serializer == "pickle":
            import pickle  # seldom

            self._foreign = Extension.PICKLE
            self._dumps, self._loads = partial(pickle.dumps, protocol=5), pickle.loads
        elif isinstance(serializer, str):
            if serializer != "msgpack":
                raise ValueError(
                    f"unknown serializer {serializer!r}: choose 'msgpack', 'pickle', "
                    "or an object with dumps(obj) -> bytes and loads(bytes) -> obj"
                )
        elif callable(getattr(serializer, "dumps", None)) and callable(getattr(serializer, "loads", None)):
            self._foreign = Extension.SERIALIZER
            self._dumps, self._loads = serializer.dumps, serializer.loads
        else:
            raise TypeError(
                f"a serializer is 'msgpack', 'pickle', or an object with dumps(obj) -> bytes and loads(bytes) -> obj, "
                f"not {type_name(type(serializer))}"
            )

    def __reduce__(self) -> tuple[type[Codec], tuple[str | Serializer]]:
        return Codec, (self.serializer,)

    def encode(self, value: object) -> bytes:
        """Return `value` as one complete msgpack message.

        Raises SerializationError for a value that would not come back with the types it has, naming the type and
        where in the value it is.
        """
        kind = type(value)
        if self._foreign is not None:
            return self._encode_foreign(value)
        if kind in _PLAIN:
            if kind is dict or kind is list:
                packed = pack_plain(value)
                if packed is not None:
                    return packed
            try:
                data = pack(value)
            except _PASSING:
                raise
            except Exception:
                pass  # The careful way below either knows the type or says what is wrong with it.
            else:
                # Scalars are exact. In a container without the first byte of any bin or ext there is no lookalike.
                if kind in _SCALARS or len(data.translate(None, _LOOKALIKE_MARKERS)) == len(data) or _is_plain(value):
                    return data
        try:
            lowered: Any = _lower(value, [])
            return _extension(*lowered) if type(lowered) is ExtType else pack(lowered)
        except Refusal as refusal:
            raise SerializationError(f"cannot store value{refusal.path}: {refusal.reason}") from None
        except RecursionError:
            raise SerializationError("cannot store value: it is nested too deep for the stack that is left") from None
        except (ValueError, RuntimeError) as error:  # Beyond 4 GiB, or changed by another thread meanwhile.
            raise SerializationError(f"cannot store value: {error}") from error

    def decode(self, data: bytes) -> object:
        """Return the value that `encode` turned into `data`.

        Raises SerializationError for bytes that are not such a value, or that need another serializer.
        """
        try:
            return _unpackb(data, strict_map_key=False, ext_hook=self._revive_outermost)
        except (SerializationError, *_PASSING):
            raise
        except Exception as error:  # msgpack, every constructor and every serializer raise what they like.
            raise SerializationError(
                f"the stored bytes are not a value shmcache can read: {type(error).__name__}: {error}"
            ) from error

    def _encode_foreign(self, value: object) -> bytes:
        if type(value) in _SCALARS:
            try:
                return pack(value)
            except (OverflowError, UnicodeEncodeError):
                pass  # An int beyond 64 bits, a lone surrogate: the serializer may know better.
        try:
            payload: object = self._dumps(value)
        except _PASSING:
            raise
        except Exception as error:
            raise SerializationError(
                f"cannot store value: serializer {self.serializer!r} failed on {type_name(type(value))}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if type(payload) is not bytes:
            hint = ": encode it, as in `return json.dumps(obj).encode()`" if isinstance(payload, str) else ""
            raise SerializationError(
                f"cannot store value: dumps() of serializer {self.serializer!r} returned "
                f"{type_name(type(payload))}, not bytes{hint}"
            )
        assert self._foreign is not None
        try:
            return _extension(self._foreign, payload)
        except ValueError as error:
            raise SerializationError(f"cannot store value: {error}") from error

    def _revive(self, depth: int, code: int, payload: bytes) -> object:
        """Return the object of the extension `code`, found `depth` extensions deep."""
        container = _CONTAINERS.get(code)
        if container is not None:
            if depth == MAX_NESTING:
                raise SerializationError(f"the stored bytes are nested more than {MAX_NESTING} levels deep")
            return container(unpack_array(payload, depth, self._revivers[depth + 1]))
        if code == self._foreign:
            return self._loads(payload)
        from shmcache.extensions import LEAVES  # seldom

        revive = LEAVES.get(code)
        if revive is not None:
            return revive(payload)
        if code == Extension.PICKLE:
            raise SerializationError(
                "the value was written with pickle, which runs code when it is read: "
                'if every writer is trusted, open the cache with Cache(..., serializer="pickle")'
            )
        if code == Extension.SERIALIZER:
            raise SerializationError(
                "the value was written with a serializer object: open the cache with Cache(..., serializer=<the same>)"
            )
        raise SerializationError(f"the stored bytes hold the msgpack extension {code}, which shmcache does not write")


def encode_key(key: object, name: str = "key") -> bytes:
    """Return the canonical msgpack bytes of `key`: a str, bytes, int, float, bool, None, or a tuple of these.

    Two keys have the same bytes exactly if they have the same types and are equal: 1, 1.0, True, "1" and b"1" all
    differ, -0.0 and 0.0 do not.

    Tuples may hold tuples. Raises SerializationError for any other type, naming it and where in the key it is, and for
    NaN, which equals nothing. `name` is what its message calls the key.
    """
    if type(key) is tuple and _EASY_KEY_TYPES.issuperset(map(type, key)):
        try:
            return _extension(Extension.TUPLE, pack(list(key)))
        except _PASSING:
            raise
        except Exception:
            pass  # As in Codec.encode.
    try:
        return pack(_lower_key(key, 0))
    except Refusal as refusal:
        raise SerializationError(f"cannot use {name}{refusal.path}: {refusal.reason}") from None
    except (ValueError, RecursionError) as error:
        raise SerializationError(f"cannot use {name}: {error}") from error


def decode_key(data: bytes) -> object:
    """Return the key that `encode_key` turned into `data`; raises SerializationError for any other bytes."""
    key = _KEYS.decode(data)
    if encode_key(key) != data:
        raise SerializationError("the stored bytes are not a key in its canonical form")
    return key


# ---------------------------------------------------------------------------------------------------------------------
# msgpack

_Packer: Final = msgpack.Packer
_Unpacker: Final = msgpack.Unpacker
_unpackb: Final = msgpack.unpackb
ExtType: Final = msgpack.ExtType

_SCALARS: Final = frozenset({str, bytes, int, float, bool, type(None)})
_PLAIN: Final = _SCALARS | {list, dict}  # What msgpack itself gives back as it was.
_LOOKALIKE_MARKERS: Final = bytes([*range(0xC4, 0xCA), *range(0xD4, 0xD9)])  # The first bytes of bin and ext.
_KEPT_BUFFER: Final = 1 << 20  # A packer never shrinks its buffer, so one that packed more bytes than this is let go.
# Not about the data: memory is short, or a signal handler has interrupted whatever was running.
_PASSING: Final = (MemoryError, TimeoutError)

_STACK_DEPTH: Final = 1  # unpackb() takes 40 KB of C stack, of which a thread may have little: deeper, use the heap.

# A packer is neither thread-safe nor reentrant (a finalizer may run in the middle), so it is out of the list in use.
_idle_packers: Final[list[Any]] = []


def pack(value: object) -> bytes:
    try:
        packer = _idle_packers.pop()
    except IndexError:
        packer = _Packer(strict_types=True)
    # When this raises the packer is dropped: its buffer may be of any size.
    data: bytes = packer.pack(value)
    if len(data) <= _KEPT_BUFFER:
        _idle_packers.append(packer)
    return data


_FIXEXT: Final = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}


def _extension(code: int, payload: bytes) -> bytes:
    """Return the bytes that the packer makes of an extension, with two copies of the payload less."""
    size = len(payload)
    if size in _FIXEXT:
        return bytes((_FIXEXT[size], code)) + payload
    if size <= 0xFF:
        return bytes((0xC7, size, code)) + payload
    if size <= 0xFFFF:
        return struct.pack(">BHB", 0xC8, size, code) + payload
    if size <= 0xFFFF_FFFF:
        return struct.pack(">BIB", 0xC9, size, code) + payload
    raise ValueError("more than the 4 GiB that msgpack allows an extension")


def _no_extension(code: int, payload: bytes) -> object:
    raise ValueError(f"extension {code} where there can be none")


def unpack_array(payload: bytes, depth: int, ext_hook: Callable[[int, bytes], object] = _no_extension) -> list[Any]:
    if depth < _STACK_DEPTH:
        items = _unpackb(payload, strict_map_key=False, ext_hook=ext_hook)
    else:
        unpacker = _Unpacker(strict_map_key=False, ext_hook=ext_hook, max_buffer_size=max(len(payload), 1))
        unpacker.feed(payload)
        items = unpacker.unpack()
        if unpacker.tell() != len(payload):
            raise ValueError("extra bytes after an array")
    if type(items) is not list:
        raise ValueError(f"{type(items).__name__} in place of an array")
    return items


def _is_plain(value: object) -> bool:
    """Tell whether there is nothing but exact plain types in `value`, which the packer has found to be free of cycles.

    The packer lets a few types through that would come back as others: bytearray, memoryview and its own ExtType.
    """
    containers: list[Any] = [value]
    for container in containers:
        items = chain(container, container.values()) if type(container) is dict else container
        for item in items:
            kind = type(item)
            if kind not in _SCALARS:
                if kind not in _PLAIN:
                    return False
                containers.append(item)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Lowering: the same value in nothing but what msgpack keeps, plain types and extensions


class Refusal(Exception):
    """Something that cannot be stored; each container on the way out adds its step to the path."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.steps: list[str] = []

    @property
    def path(self) -> str:
        steps = self.steps[::-1]
        return "".join(steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]])


def _lower(value: Any, parents: list[int]) -> object:
    """Return `value` lowered; `parents` are the ids of the containers it lies in."""
    kind = type(value)
    if kind is str:
        return checked_text(value)
    if kind is int:
        return _lower_int(value)
    if kind in _SCALARS:
        return value
    if kind is dict or kind is list or kind in _CONTAINER_CODES:
        if id(value) in parents:
            raise Refusal("a container that contains itself cannot be stored")
        if len(parents) == MAX_NESTING:
            raise Refusal(f"nested more than {MAX_NESTING} levels deep")
        parents.append(id(value))
        lowered = _lower_dict(value, parents) if kind is dict else _lower_items(value, parents)
        parents.pop()
        return ExtType(_CONTAINER_CODES[kind], pack(lowered)) if kind in _CONTAINER_CODES else lowered
    from shmcache.extensions import LOWER_LEAF, lower_numpy  # seldom

    lower_leaf = LOWER_LEAF.get(kind)
    if lower_leaf is not None:
        code, pack_payload = lower_leaf
        return ExtType(code, pack_payload(value))
    if kind.__module__ == "numpy":
        extension = lower_numpy(value)
        if extension is not None:
            return extension
    raise Refusal(_unsupported(value))


def _lower_items(items: Iterable[Any], parents: list[int]) -> list[object]:
    lowered: list[object] = []
    item = None
    try:
        for item in items:
            lowered.append(_lower(item, parents))
    except Refusal as refusal:
        ordered = isinstance(items, (list, tuple))
        refusal.steps.append(f"[{len(lowered)}]" if ordered else f"{{{show(item)}}}")
        raise
    return lowered


def _lower_dict(mapping: dict[Any, Any], parents: list[int]) -> dict[object, object]:
    lowered: dict[object, object] = {}
    for key, value in mapping.items():
        try:
            lowered_key = _lower(key, parents)
        except Refusal as refusal:
            refusal.steps.append(f"[key {show(key)}]")
            raise
        try:
            lowered[lowered_key] = _lower(value, parents)
        except Refusal as refusal:
            refusal.steps.append(f"[{show(key)}]")
            raise
    if len(lowered) < len(mapping):
        raise Refusal("several keys of a dict have one form when stored, as those that contain a NaN may")
    return lowered


def _lower_key(key: Any, depth: int) -> object:
    kind = type(key)
    if kind is str:
        return checked_text(key)
    if kind is int:
        return _lower_int(key)
    if kind is float:
        if key != key:
            raise Refusal("NaN equals nothing, so an entry under it could never be found")
        return key + 0.0  # Makes -0.0, which equals 0.0, the same bytes.
    if kind in _SCALARS:
        return key
    if kind is not tuple:
        raise Refusal(f"{type_name(kind)} is not a key type; {_KEY_TYPES}")
    if depth == MAX_NESTING:
        raise Refusal(f"nested more than {MAX_NESTING} levels deep")
    parts: list[object] = []
    try:
        for part in key:
            parts.append(_lower_key(part, depth + 1))
    except Refusal as refusal:
        refusal.steps.append(f"[{len(parts)}]")
        raise
    return ExtType(Extension.TUPLE, pack(parts))


def _lower_int(value: int) -> object:
    if -(1 << 63) <= value < 1 << 64:
        return value
    return ExtType(Extension.BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"a str with the lone surrogate {text[error.start]!a} has no UTF-8 form") from None
    return text


_KEY_TYPES: Final = "keys are str, bytes, int, float, bool, None, and tuples of these"
_EASY_KEY_TYPES: Final = frozenset({str, bytes, int, bool, type(None)})  # Floats need a look at their value.


def _unsupported(value: object) -> str:
    kind = type(value)
    if isinstance(value, FunctionType):
        # Pickle keeps a function by its name, which those made within others have not.
        remedy = _UNKEEPABLE[kind] if "<" in value.__qualname__ else REMEDY
    else:
        remedy = _UNKEEPABLE.get(kind, REMEDY)
    from shmcache.extensions import LOWER_LEAF  # seldom

    kept = _PLAIN | _CONTAINER_CODES.keys() | LOWER_LEAF.keys()
    known = next((base for base in kind.__mro__[1:] if base in kept), None)
    why = f"would come back as a plain {known.__name__}" if known else "is not a type that msgpack can keep"
    return f"{type_name(kind)} {why}; {remedy}"


REMEDY: Final = 'convert it to a plain type, or open the cache with Cache(..., serializer="pickle")'
_UNKEEPABLE: Final[dict[type, str]] = {  # by any serializer
    CoroutineType: "await it, and store what that gives",
    GeneratorType: "store what it yields, for instance list(...) of it",
    AsyncGeneratorType: "store what it yields, for instance as a list",
    FunctionType: "store what it returns",
}


def type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def show(key: object) -> str:
    try:
        return reprlib.repr(key)
    except Exception:  # A repr may fail, that of an int of more than 4300 digits does.
        return f"<{type(key).__name__}>"


_CONTAINERS: Final[dict[int, Callable[[list[Any]], object]]] = {
    Extension.TUPLE: tuple,
    Extension.SET: set,
    Extension.FROZENSET: frozenset,
}
_CONTAINER_CODES: Final[dict[type, Extension]] = {
    tuple: Extension.TUPLE,
    set: Extension.SET,
    frozenset: Extension.FROZENSET,
}
_KEYS: Final = Codec()
