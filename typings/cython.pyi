# What mypy takes `import cython` for: a C type is the Python type that holds its values. Like the shim at run time, it
# has just what the engine uses.

import builtins
from collections.abc import Callable
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")

compiled: Literal[False]

bint = bool
uchar = builtins.int
int = builtins.int
uint = builtins.int
longlong = builtins.int
ulonglong = builtins.int
Py_ssize_t = builtins.int
double = float
p_uchar = Any
p_char = Any

def cclass(thing: _T) -> _T: ...
def ccall(thing: _T) -> _T: ...
def cfunc(thing: _T) -> _T: ...
def final(thing: _T) -> _T: ...
def inline(thing: _T) -> _T: ...
def nogil(thing: _T) -> _T: ...
def exceptval(*args: Any, **options: Any) -> Callable[[_T], _T]: ...
def freelist(size: builtins.int) -> Callable[[_T], _T]: ...
def cast(type: Any, value: Any, **options: Any) -> Any: ...
