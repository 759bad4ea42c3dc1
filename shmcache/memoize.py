"""Caching what a function returns: `Cache.memoize` lives in this file.

A result's key is the name of its function, given or made with `fingerprint.py`, and the arguments, bound to the
parameters that the function itself has: those of a function that it wraps do not tell what it does with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from shmcache.codec import encode_key
from shmcache.engine.store import DEFAULT
from shmcache.errors import SerializationError
from shmcache.fingerprint import beneath_lru_cache, fingerprint, memoized_names

if TYPE_CHECKING:
    from shmcache.cache import Cache

__all__ = ["CacheInfo", "Memoized", "memoize"]


class CacheInfo(NamedTuple):
    """Calls of one decorated function in this process, and its entries in the cache of all processes."""

    hits: int
    misses: int
    entries: int


class Memoized(Protocol):
    """A decorated function."""

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def cache_info(self) -> CacheInfo: ...

    def cache_clear(self) -> int: ...

    def cache_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...


def memoize(
    cache: Cache, ttl: object, key: Callable[..., Any] | None, name: str | None, function: Callable[..., Any]
) -> Memoized:
    """Wrap `function` so that it is called once for each key, for as long as its result stays in `cache`.

    Arguments are bound to their parameters first, so `f(1)`, `f(a=1)` and a default of 1 are one key.
    """
    label, signature = _inspect(function)
    if name is None:
        name = f"{label}-{fingerprint(function, label)}"
        if key is not None:
            name += f"-{fingerprint(key, f'the key function of {label}')}"
    extra = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    hits = misses = 0

    def cache_key(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The key in the cache for these arguments."""
        if key is not None:
            return ("memoize", name, key(*args, **kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if extra is not None:
            bound.arguments[extra] = tuple(sorted(bound.arguments[extra].items()))
        return ("memoize", name, *bound.arguments.values())

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

    def look_up(entry: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal hits, misses
        try:
            value = cache.get(entry, DEFAULT)
        except SerializationError:
            check_key(entry, args, kwargs)
            raise  # it is about the stored value
        if value is DEFAULT:
            misses += 1
        else:
            hits += 1
        return value

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = cache_key(*args, **kwargs)
            value = look_up(entry, args, kwargs)
            if value is DEFAULT:
                value = await function(*args, **kwargs)
                cache.set(entry, value, ttl)
            return value

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = cache_key(*args, **kwargs)
            value = look_up(entry, args, kwargs)
            if value is DEFAULT:
                value = function(*args, **kwargs)
                cache.set(entry, value, ttl)
            return value

    def entries() -> list[tuple[Any, ...]]:
        return [each for each in cache.keys() if type(each) is tuple and each[:2] == ("memoize", name)]  # noqa: SIM118

    def cache_info() -> CacheInfo:
        """Hits and misses of this process, entries of all."""
        return CacheInfo(hits, misses, len(entries()))

    def cache_clear() -> int:
        """Forget every result of this function, for all processes; how many there were."""
        nonlocal hits, misses
        hits = misses = 0
        return cache.delete_many(entries())

    memoized_names[wrapper] = name
    decorated: Any = wrapper
    decorated.cache_key = cache_key
    decorated.cache_info = cache_info
    decorated.cache_clear = cache_clear
    memoized: Memoized = decorated
    return memoized


def _inspect(function: Any) -> tuple[str, inspect.Signature]:
    """The name of a function, with its module, and its own signature; raises TypeError for what has none."""
    kind = type(function).__name__
    if isinstance(function, (staticmethod, classmethod, property, functools.cached_property)):
        raise TypeError(f"memoize decorates functions, not a {kind}: put it below @{kind}, next to the def")
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or not isinstance(name, str):
        raise TypeError(f"memoize decorates functions, not {kind} ({function!r}): write a def that calls it")
    label = f"{module}.{name}" if isinstance(module, str) else name
    try:
        return label, inspect.signature(beneath_lru_cache(function), follow_wrapped=False)
    except ValueError:
        raise TypeError(f"{label} does not tell what its parameters are: write a def that calls it") from None
