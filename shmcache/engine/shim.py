"""What `import cython` gives where Cython is not installed: just enough for the engine's sources to run uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["binding", "cast", "cclass", "cfunc", "compiled", "embedsignature", "final", "inline"]

T = TypeVar("T")

compiled = False

# Types: annotations only, never called.
bint = int = ulonglong = longlong = p_uchar = object


def _unchanged(thing: T) -> T:
    return thing


cclass = cfunc = final = inline = _unchanged


def binding(_value: object) -> Callable[[T], T]:
    return _unchanged


class embedsignature:
    format = staticmethod(binding)


def cast(_type: Any, value: T) -> T:
    return value
