"""What `import cython` gives where Cython is not installed: just enough for the engine's sources to run uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = [
    "boundscheck",
    "cast",
    "ccall",
    "cclass",
    "cfunc",
    "compiled",
    "exceptval",
    "final",
    "freelist",
    "inline",
    "nogil",
]

T = TypeVar("T")

compiled = False

# Types: annotations only, never called.
bint = int = uchar = ulonglong = longlong = p_uchar = object


def _unchanged(thing: T) -> T:
    return thing


cclass = ccall = cfunc = final = inline = nogil = _unchanged


def exceptval(*_args: Any, **_options: Any) -> Callable[[T], T]:
    return _unchanged


freelist = boundscheck = exceptval


def cast(_type: Any, value: T, **_options: Any) -> T:
    return value
