"""What the environment says of a cache: the variables, what each may be, and whose fault it is when that makes none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shmcache import segment
from shmcache.engine.store import MAX_TTL_NS
from shmcache.errors import GeometryMismatch, SegmentTooLarge

if TYPE_CHECKING:
    from shmcache.cache import Cache

__all__ = ["open_cache"]

AnyCache = TypeVar("AnyCache", bound="Cache")


def open_cache(kind: type[AnyCache], defaults: dict[str, Any]) -> AnyCache:
    """`Cache.from_env`."""
    options = {"name": "default", **defaults}
    said: dict[str, str] = {}
    for variable, option, convert in _VARIABLES:
        text = os.environ.get(variable, "").strip()
        if text:
            try:
                options[option] = convert(text)
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} in the environment: {error}") from None
            said[option] = f"{variable}={text!r}"
    try:
        return kind(**options)
    except (SegmentTooLarge, ValueError) as error:
        # Messages about the geometry name the arguments that do not do; SegmentTooLarge is about one only.
        guilty = [said[option] for option in said if f"{option}=" in str(error)]
        if isinstance(error, SegmentTooLarge) and "max_bytes" in said:
            guilty = [said["max_bytes"]]
        if not guilty or type(error) not in (ValueError, GeometryMismatch, SegmentTooLarge):
            raise
        raise type(error)(f"{' and '.join(guilty)} in the environment: {error}") from error


def _named(text: str) -> str:
    segment.check_name(text)
    return text


def _entries(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= segment.MAX_ENTRIES:
        raise ValueError(f"expected a whole number of entries, 1 to {segment.MAX_ENTRIES:,}")
    return number


def _seconds(text: str) -> float:
    number, most = _float(text), MAX_TTL_NS // 10**9
    if not 0 < number <= most:
        raise ValueError(
            f"expected a number of seconds greater than 0 and at most {most:,} (146 years); leave it unset for no "
            f"expiry, or for the default_ttl that the program gives"
        )
    return number


def _megabytes(text: str) -> int:
    number, limit = _float(text), 1 << 43
    if not 0 < number < limit:
        raise ValueError(
            f"expected a number of MB (1,048,576 bytes) greater than 0 and less than {limit:,}, such as 64"
        )
    return int(number * 2**20) or 1


def _float(text: str) -> float:
    """The number, or NaN, which no range has."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


_VARIABLES: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("CACHE_NAME", "name", _named),
    ("CACHE_MAX_SIZE", "max_entries", _entries),
    ("CACHE_TTL", "default_ttl", _seconds),
    ("CACHE_MAX_MEMORY_MB", "max_bytes", _megabytes),
)
"""Each variable of `Cache.from_env`, the argument it stands for, and what makes the one of the other."""
