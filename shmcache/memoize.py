"""Caching what a function returns: `Cache.memoize` lives in this file.

A result's key is the name of its function, given or made with `fingerprint.py`, and the arguments, bound to the
parameters that the function itself has: those of a function that it wraps do not tell what it does with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload

from shmcache.codec import encode_key
from shmcache.engine.memo import Memo
from shmcache.engine.store import DEFAULT
from shmcache.errors import SerializationError
from shmcache.fingerprint import beneath_lru_cache, fingerprint, memoized_names, module_name

if TYPE_CHECKING:
    from shmcache.cache import Cache

__all__ = ["CacheInfo", "Memoized", "memoize"]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Result = TypeVar("Result")


class CacheInfo(NamedTuple):
    """Calls of one decorated function in this process, and its entries in the cache of all processes."""

    hits: int
    misses: int
    entries: int


class Memoized(Protocol[P, R]):
    """A decorated function."""

    @property
    def __wrapped__(self) -> Callable[P, R]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __get__(self, instance: None, owner: Any = None, /) -> Memoized[P, R]: ...

    @overload
    def __get__(self, instance: object, owner: Any = None, /) -> Memoized[..., R]: ...

    def cache_info(self) -> CacheInfo:
        """Hits and misses of this process, entries of all."""

    def cache_clear(self) -> int:
        """Forget every result of this function, for all processes; how many there were."""

    def cache_key(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Any, ...]:
        """The key in the cache for these arguments, with the `self` of a method first."""


def memoize(
    cache: Cache, ttl: object, key: Callable[..., Any] | None, name: str | None, function: Callable[P, Result]
) -> Memoized[P, Result]:
    """Wrap `function` so that it is called once for each key, for as long as its result stays in `cache`.

    Arguments are bound to their parameters first, so `f(1)`, `f(a=1)` and a default of 1 are one key.
    """
    label, signature = _inspect(function)
    if name is None:
        name = f"{label}-{fingerprint(function, label)}"
        if key is not None:
            name += f"-{fingerprint(key, f'the key function of {label}')}"
    encode_key(name, "name")  # or SerializationError now rather than with each call
    prefix = ("memoize", name)
    parameters = signature.parameters.values()
    extra = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)

    def cache_key(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The key in the cache for these arguments."""
        if key is not None:
            return (*prefix, key(*args, **kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if extra is not None:
            bound.arguments[extra] = tuple(sorted(bound.arguments[extra].items()))
        return (*prefix, *bound.arguments.values())

    def check_key(entry: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise SerializationError if it is the arguments, or what `key` made of them, that cannot be a key."""
        if key is not None:
            try:
                encode_key(entry[2], "what it returned")
            except SerializationError as error:
                raise SerializationError(
                    f"the function given as memoize(key=...) for {label} did not return a key: {error}"
                ) from error
            return
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        if extra is not None:
            arguments.update(arguments.pop(extra, {}))
        for parameter, argument in arguments.items():
            try:
                encode_key(argument, parameter)
            except SerializationError as error:
                raise SerializationError(
                    f"the argument `{parameter}` of {label} cannot be part of a cache key ({error}): decorate it with "
                    f"memoize(key=...), a function of the same arguments that returns a str, bytes, number or a tuple "
                    f"of these"
                ) from error

    required, most, tail = (0, -1, ()) if key is not None else _positional(signature)
    memo = Memo(cache, function, ttl, prefix, tail, required, most, cache_key, check_key)
    decorated: Any = memo
    if inspect.iscoroutinefunction(function):

        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = memo.key(args, kwargs)
            value = memo.look_up(entry, args, kwargs)
            if value is DEFAULT:
                value = await function(*args, **kwargs)
                cache.set(entry, value, ttl)
            return value

        decorated = wrapper

    def entries() -> list[tuple[Any, ...]]:
        return [each for each in cache.keys() if type(each) is tuple and each[:2] == prefix]  # noqa: SIM118

    def cache_info() -> CacheInfo:
        """Hits and misses of this process, entries of all."""
        return CacheInfo(memo.hits, memo.misses, len(entries()))

    def cache_clear() -> int:
        """Forget every result of this function, for all processes; how many there were."""
        memo.hits = memo.misses = 0
        return cache.delete_many(entries())

    functools.update_wrapper(decorated, function)
    memoized_names[decorated] = name
    decorated.cache_key = cache_key
    decorated.cache_info = cache_info
    decorated.cache_clear = cache_clear
    memoized: Memoized[P, Result] = decorated
    return memoized


def _inspect(function: Any) -> tuple[str, inspect.Signature]:
    """The name of a function, with its module, and its own signature; raises TypeError for what has none."""
    kind = type(function).__name__
    if isinstance(function, (staticmethod, classmethod, property, functools.cached_property)):
        raise TypeError(f"memoize decorates functions, not a {kind}: put it below @{kind}, next to the def")
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or not isinstance(name, str):
        raise TypeError(f"memoize decorates functions, not {kind} ({function!r}): write a def that calls it")
    label = f"{module_name(module)}.{name}" if isinstance(module, str) else name
    try:
        return label, inspect.signature(beneath_lru_cache(function), follow_wrapped=False)
    except ValueError:
        raise TypeError(f"{label} does not tell what its parameters are: write a def that calls it") from None


def _positional(signature: inspect.Signature) -> tuple[int, int, tuple[Any, ...]]:
    """How many positional arguments suffice for a call, how many it takes, and what stands for the others in the key.

    Without any argument by keyword the key follows from these alone. 0 and -1 if that cannot be said of any call.
    """
    required, tail, most = 0, [], 0
    for each in signature.parameters.values():
        positional = each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        most += positional
        if each.kind is each.VAR_KEYWORD:
            tail.append(())
        elif each.default is not each.empty:
            tail.append(each.default)
        elif positional:
            required += 1
        else:
            return 0, -1, ()
    return required, most, tuple(tail)
