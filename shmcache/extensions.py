"""The types of Python and numpy that msgpack has not, each with how it becomes the payload of an extension and back.

Nothing but such a type needs this module, so `codec.py` imports it when it meets one: it brings `decimal`, `uuid` and
`zoneinfo`, which take longer to import than the rest of the package together.
"""

from __future__ import annotations

import importlib
import math
import re
import struct
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from shmcache.codec import REMEDY, Extension, ExtType, Refusal, checked_text, pack, show, type_name, unpack_array
from shmcache.errors import SerializationError

__all__ = ["LEAVES", "LOWER_LEAF", "lower_numpy"]


def _pack_zone(zone: tzinfo | None) -> object:
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key is not None:
        return zone.key
    if type(zone) is timezone:
        offset, name = (*zone.__getinitargs__(), None)[:2]  # type: ignore[attr-defined]
        return [offset // timedelta(microseconds=1), name]
    raise Refusal(
        f"the time zone {type_name(type(zone))} would be lost; use datetime.timezone, a zoneinfo.ZoneInfo with a key, "
        'or open the cache with Cache(..., serializer="pickle")'
    )


def _revive_zone(zone: Any) -> tzinfo | None:
    if zone is None:
        return None
    if type(zone) is str:
        return ZoneInfo(zone)
    microseconds, name = zone
    offset = timedelta(microseconds=microseconds)
    return timezone(offset) if name is None else timezone(offset, name)


def _pack_datetime(at: datetime) -> bytes:
    clock = (at.hour, at.minute, at.second, at.microsecond, at.fold)
    return pack([at.year, at.month, at.day, *clock, _pack_zone(at.tzinfo)])


def _revive_datetime(payload: bytes) -> datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = unpack_array(payload, 0)
    return datetime(year, month, day, hour, minute, second, microsecond, _revive_zone(zone), fold=fold)


def _pack_date(day: date) -> bytes:
    return pack([day.year, day.month, day.day])


def _revive_date(payload: bytes) -> date:
    year, month, day = unpack_array(payload, 0)
    return date(year, month, day)


def _pack_time(at: time) -> bytes:
    return pack([at.hour, at.minute, at.second, at.microsecond, at.fold, _pack_zone(at.tzinfo)])


def _revive_time(payload: bytes) -> time:
    hour, minute, second, microsecond, fold, zone = unpack_array(payload, 0)
    return time(hour, minute, second, microsecond, _revive_zone(zone), fold=fold)


def _pack_timedelta(delta: timedelta) -> bytes:
    return pack([delta.days, delta.seconds, delta.microseconds])


def _revive_timedelta(payload: bytes) -> timedelta:
    days, seconds, microseconds = unpack_array(payload, 0)
    return timedelta(days, seconds, microseconds)


def _pack_complex(number: complex) -> bytes:
    return struct.pack(">dd", number.real, number.imag)


def _revive_complex(payload: bytes) -> complex:
    return complex(*struct.unpack(">dd", payload))


def _pack_decimal(number: Decimal) -> bytes:
    return str(number).encode("ascii")


def _revive_decimal(payload: bytes) -> Decimal:
    return Decimal(payload.decode("ascii"))


def _pack_uuid(value: UUID) -> bytes:
    return value.bytes


def _revive_uuid(payload: bytes) -> UUID:
    return UUID(bytes=payload)


def _revive_big_int(payload: bytes) -> int:
    return int.from_bytes(payload, "big", signed=True)


_MAX_DIMENSIONS: Final = 64  # numpy's own limit; the product of any number of large ints would take for ever

# A dtype that numpy may be asked to parse: numbers, text, raw bytes and dates; never objects, never a list in a string.
_DTYPE: Final = re.compile(r"[<>|=](?:[biufcSUV][0-9]{1,10}|[qQ]|[mM]8(?:\[[0-9]{0,10}[A-Za-z]{1,7}\])?)")


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise SerializationError("the value holds a numpy array or scalar: install numpy to read it") from error


def lower_numpy(value: Any) -> object:
    """Return a numpy array or scalar as an extension, None for any other class of numpy."""
    numpy = _numpy()
    kind = type(value)
    if kind is numpy.str_:
        return ExtType(Extension.NUMPY_STR, checked_text("".join(value)).encode())
    if kind is numpy.bytes_:
        return ExtType(Extension.NUMPY_BYTES, bytes(value))
    if kind is numpy.ndarray:
        return ExtType(Extension.NUMPY_ARRAY, _pack_numpy(value))
    if issubclass(kind, numpy.generic) and value.dtype.type is kind:
        return ExtType(Extension.NUMPY_SCALAR, _pack_numpy(value))
    return None


def _pack_numpy(value: Any) -> bytes:
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    header = pack([_dtype_spec(value.dtype), order, list(value.shape)])
    items = value.ravel(order).view("u1").data if value.nbytes else b""  # No copy of an array that lies in one piece.
    return b"".join((len(header).to_bytes(4, "big"), header, items))


def _revive_numpy_array(payload: bytes) -> Any:
    start = 4 + int.from_bytes(payload[:4], "big")
    spec, order, shape = unpack_array(payload[4:start], 0)
    dtype = _dtype(spec)
    items = bytearray(memoryview(payload)[start:])  # A copy, so that the array can be written to.
    # Python ints do not overflow, and numpy, given the memory, takes none of its own.
    if len(shape) > _MAX_DIMENSIONS or any(type(extent) is not int or extent < 0 for extent in shape):
        raise ValueError("a shape is made of a few sizes")
    if math.prod(shape) * dtype.itemsize != len(items):
        raise ValueError(f"{len(items)} bytes are no array of this shape and dtype")
    return _numpy().ndarray(tuple(shape), dtype, items, order=order)


def _revive_numpy_scalar(payload: bytes) -> object:
    return _revive_numpy_array(payload).reshape(())[()]


def _revive_numpy_str(payload: bytes) -> object:
    return _numpy().str_(payload.decode())


def _revive_numpy_bytes(payload: bytes) -> object:
    return _numpy().bytes_(payload)


def _dtype_spec(dtype: Any) -> object:
    """Return what `_dtype` turns back into the same dtype; refuse one for which there is nothing of the kind."""
    try:
        # The second is for `long long`, which may have the size of `long` and yet is another type.
        candidates = (dtype.str, dtype.byteorder + dtype.char) if dtype.names is None else (dtype.descr,)
        for spec in candidates:
            restored = _dtype(spec)
            if restored == dtype and restored.type is dtype.type:
                return _with_lists(spec)
    except Exception:  # Fields that overlap, a kind that is not allowed.
        pass
    raise Refusal(f"a numpy object of dtype {dtype} cannot be kept; {REMEDY}")


def _with_lists(spec: Any) -> object:
    return [_with_lists(part) for part in spec] if isinstance(spec, (list, tuple)) else spec


def _dtype(spec: Any) -> Any:
    return _numpy().lib.format.descr_to_dtype(_descr(spec))


def _descr(spec: Any) -> object:
    """Return `spec` as numpy's `dtype.descr` has it, each type in it checked."""
    if type(spec) is not list:
        if type(spec) is not str or _DTYPE.fullmatch(spec) is None:
            raise ValueError(f"dtype {show(spec)} is not allowed")
        return spec
    fields: list[object] = []
    for name, inner, *shape in spec:
        fields.append((tuple(name) if type(name) is list else name, _descr(inner), *map(tuple, shape)))
    return fields


LOWER_LEAF: Final[dict[type, tuple[Extension, Callable[[Any], bytes]]]] = {
    bytearray: (Extension.BYTEARRAY, bytes),
    complex: (Extension.COMPLEX, _pack_complex),
    Decimal: (Extension.DECIMAL, _pack_decimal),
    UUID: (Extension.UUID, _pack_uuid),
    datetime: (Extension.DATETIME, _pack_datetime),
    date: (Extension.DATE, _pack_date),
    time: (Extension.TIME, _pack_time),
    timedelta: (Extension.TIMEDELTA, _pack_timedelta),
}
LEAVES: Final[dict[int, Callable[[bytes], object]]] = {
    Extension.BYTEARRAY: bytearray,
    Extension.BIG_INT: _revive_big_int,
    Extension.COMPLEX: _revive_complex,
    Extension.DECIMAL: _revive_decimal,
    Extension.UUID: _revive_uuid,
    Extension.DATETIME: _revive_datetime,
    Extension.DATE: _revive_date,
    Extension.TIME: _revive_time,
    Extension.TIMEDELTA: _revive_timedelta,
    Extension.NUMPY_ARRAY: _revive_numpy_array,
    Extension.NUMPY_SCALAR: _revive_numpy_scalar,
    Extension.NUMPY_STR: _revive_numpy_str,
    Extension.NUMPY_BYTES: _revive_numpy_bytes,
}
