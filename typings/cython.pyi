# What mypy takes `import cython` for: a C type is the Python type that holds its values. Like the shim at run time, it
# has just what the engine uses.

import builtins
from collections.abc import Callable
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")

compiled: Literal[False]

bint = bool
int = builtins.int
longlong = builtins.int
ulonglong = builtins.int
p_uchar = Any

def binding(value: bool) -> Callable[[_T], _T]: ...

class embedsignature:
    @staticmethod
    def format(value: str) -> Callable[[_T], _T]: ...

def cclass(thing: _T) -> _T: ...
def cfunc(thing: _T) -> _T: ...
def inline(thing: _T) -> _T: ...
def final(thing: _T) -> _T: ...
def cast(type: Any, value: Any) -> Any: ...
