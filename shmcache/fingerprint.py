"""What tells two functions apart, so that `Cache.memoize` never gives the results of one for those of another.

The rule: two functions are the same if they have the same code, and everything that Python keeps with the code is the
same: defaults, closed-over variables, attributes, what a method is bound to, the arguments of a `partial`. Of these
values

- None, bool, int, float, complex, str, bytes, and tuples and frozensets of values, count as they are;
- functions count by this rule, so a wrapper is told by its own code and by the function that it wraps;
- modules, classes, members of enums and functions written in C count by name, if an import finds them under it, and
  `attrgetter` and `itemgetter` by what they get; a module that is run as a program counts by the file it is in;
- a memoized function counts by the name that its results have; one with an `lru_cache` is the function beneath it;
- anything else is refused, for it cannot be told apart, or may change.

They count as they are when the function is decorated. Not part of it are annotations, and the global variables of a
module: functions of two modules are told apart by the names of these, and a module has one value for each. Where the
globals are not those of a module, as `exec` can have it, those that the code names count like closed-over variables.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from enum import Enum
from operator import attrgetter, itemgetter
from types import CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import WeakKeyDictionary

from shmcache.engine.memo import Memo

__all__ = ["beneath_lru_cache", "fingerprint", "memoized_names", "module_name"]

memoized_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # by the decorated function

_SCALARS = (NoneType, bool, int, float, complex, str, bytes, EllipsisType)


def fingerprint(function: Any, label: str) -> str:
    """Sixteen digits that are the same for the same function, in all processes of one version of Python.

    Raises TypeError if it cannot be told apart, saying what of it; `label` is what the message calls the function.
    """
    return _Describer(label).describe(function, ()).hex()[:16]


def beneath_lru_cache(function: Any) -> Any:
    """The function that an `lru_cache` calls, which is what it returns the results of."""
    while isinstance(function, functools._lru_cache_wrapper):
        function = function.__wrapped__
    return function


def module_name(name: str) -> str:
    """What a module is called in all processes: each calls the program that it runs `__main__`, and so may another."""
    if name not in ("__main__", "__mp_main__"):
        return name
    module = sys.modules.get(name)
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return os.path.realpath(file) if isinstance(file, str) else name


class _Describer:
    """Describes one function. Functions may refer to each other, so one met again counts by when it was met first.

    A `trail` says how a value was come by, for people: ("closes over helper", "has the default n").
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.met: dict[int, int] = {}

    def describe(self, value: Any, trail: tuple[str, ...]) -> bytes:
        """A digest of any value that the rule knows."""
        value = beneath_lru_cache(value)
        kind = type(value)
        if kind in _SCALARS:
            # Python refuses to write large ints in decimal.
            return _digest(kind.__name__, (hex(value) if kind is int else repr(value)).encode())
        if kind is tuple:
            return _digest("tuple", *(self.describe(each, trail) for each in value))
        if kind is frozenset:
            return _digest("frozenset", *sorted(self.describe(each, trail) for each in value))
        if kind is slice:  # a constant of code, from Python 3.14 on
            return _digest("slice", *(self.describe(each, trail) for each in (value.start, value.stop, value.step)))
        if kind is CodeType:
            return self.describe_code(value, trail)
        if kind in (FunctionType, Memo) and value in memoized_names:
            return _digest("memoized", memoized_names[value].encode())
        if kind is MethodType:
            bound = self.describe(value.__self__, (*trail, "is bound to self"))
            return _digest("method", self.describe(value.__func__, trail), bound)
        if kind is FunctionType or kind is functools.partial:
            if id(value) in self.met:
                return _digest("met", str(self.met[id(value)]).encode())
            self.met[id(value)] = len(self.met)
            return self.describe_function(value, trail) if kind is FunctionType else self.describe_partial(value, trail)
        if kind in (attrgetter, itemgetter):
            return _digest(kind.__name__, self.describe(value.__reduce__()[1], trail))
        if (name := _import_name(value)) is not None:
            return _digest("import", name.encode())
        raise self.refusal(trail, _article(value))

    def describe_function(self, function: FunctionType, trail: tuple[str, ...]) -> bytes:
        modules = map(module_name, map(str, (function.__globals__.get("__name__"), function.__module__)))
        names = (*modules, function.__qualname__)
        parts = [*(name.encode() for name in names), self.describe_code(function.__code__, trail)]
        for what, values in (
            ("has the default", _defaults(function)),
            ("closes over", self.closed_over(function, trail)),
            ("has the attribute", function.__dict__.items()),
            ("uses the global", _foreign_globals(function)),
        ):
            described = [
                part
                for name, value in values
                for part in (name.encode(), self.describe(value, (*trail, f"{what} {name}")))
            ]
            parts.append(_digest(what, *described))
        return _digest("function", *parts)

    def describe_partial(self, partial: functools.partial[Any], trail: tuple[str, ...]) -> bytes:
        parts = [self.describe(partial.func, (*trail, "calls func"))]
        for number, value in enumerate(partial.args):
            parts.append(self.describe(value, (*trail, f"is given argument {number}")))
        for name, value in partial.keywords.items():
            parts += name.encode(), self.describe(value, (*trail, f"is given {name}"))
        return _digest("partial", str(len(partial.args)).encode(), *parts)

    def describe_code(self, code: CodeType, trail: tuple[str, ...]) -> bytes:
        """A digest of all that code is, but for where it stands."""
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_qualname, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        parts = (code.co_code, code.co_exceptiontable, repr((counts, names)).encode())
        return _digest("code", *parts, *(self.describe(constant, trail) for constant in code.co_consts))

    def closed_over(self, function: FunctionType, trail: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        """The variables of functions around it that have a value; those that have none yet must be itself."""
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                # Its own name is bound, and its class is made, once it has been decorated.
                made_once = variable == "__class__" and "<locals>" not in function.__qualname__
                if variable != function.__name__ and not made_once:
                    raise self.refusal((*trail, f"closes over {variable}"), "which has no value yet") from None
            else:
                yield variable, value

    def refusal(self, trail: tuple[str, ...], why: str) -> TypeError:
        what = f"{', which '.join(trail)}," if trail else "is"
        return TypeError(
            f"{self.label} {what} {why}: two such functions would share results; give it a name of its own with "
            f"memoize(name=...)"
        )


def _digest(kind: str, *parts: bytes) -> bytes:
    digest = hashlib.blake2s(kind.encode())
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The parameters that have a default, with it."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False)
    yield from sorted((function.__kwdefaults__ or {}).items())


def _foreign_globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that the code of a function names, if they are not a module's."""
    variables = function.__globals__
    module = sys.modules.get(str(variables.get("__name__")))
    if module is None or vars(module) is not variables:
        for name in sorted(_names(function.__code__) & variables.keys()):
            yield name, variables[name]


def _names(code: CodeType) -> set[str]:
    """The names of globals and attributes in code, and in the code within it."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*within)


def _import_name(value: Any) -> str | None:
    """The name under which an import finds this very object, if one does; a Python function has code to tell it."""
    module: Any
    if isinstance(value, ModuleType):
        module, path = value.__name__, []
    else:
        named = type(value) if isinstance(value, Enum) else value
        owner = getattr(named, "__objclass__", named)  # of a method written in C, which has no module itself
        module, qualname = getattr(owner, "__module__", None), getattr(named, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(qualname, str):
            return None
        path = [*qualname.split("."), *([str(value.name)] if isinstance(value, Enum) else [])]
    found: Any = sys.modules.get(module)
    for name in path:
        found = getattr(found, name, None)
    return ".".join([module_name(module), *path]) if found is value else None


def _article(value: object) -> str:
    if isinstance(value, type):
        return f"a class that cannot be imported ({value.__qualname__})"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
