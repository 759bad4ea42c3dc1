"""Caching what a function returns: `Cache.memoize` lives in this file."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from shmcache.engine.store import DEFAULT
from shmcache.errors import SerializationError

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
    label = f"{function.__module__}.{function.__qualname__}"
    if name is None:
        name = label
        code = getattr(function, "__code__", None)
        if code is not None:
            name += "-" + _digest(code).hex()
    signature = inspect.signature(function)
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

    def look_up(entry: tuple[Any, ...]) -> Any:
        nonlocal hits, misses
        try:
            value = cache.get(entry, DEFAULT)
        except SerializationError as error:
            raise SerializationError(
                f"the arguments of {label} cannot be a cache key ({error}): decorate it with memoize(key=...), a "
                f"function of the same arguments that returns a str, bytes, number or a tuple of these"
            ) from error
        if value is DEFAULT:
            misses += 1
        else:
            hits += 1
        return value

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = cache_key(*args, **kwargs)
            value = look_up(entry)
            if value is DEFAULT:
                value = await function(*args, **kwargs)
                cache.set(entry, value, ttl)
            return value

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = cache_key(*args, **kwargs)
            value = look_up(entry)
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

    decorated: Any = wrapper
    decorated.cache_key = cache_key
    decorated.cache_info = cache_info
    decorated.cache_clear = cache_clear
    memoized: Memoized = decorated
    return memoized


def _digest(code: CodeType) -> bytes:
    """What tells two functions of one name apart: eight bytes of their instructions, names and constants."""
    digest = hashlib.blake2s(code.co_code, digest_size=8)
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            digest.update(_digest(constant))
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())  # its own order differs between processes
        else:
            digest.update(repr(constant).encode(errors="surrogatepass"))
    return digest.digest()
