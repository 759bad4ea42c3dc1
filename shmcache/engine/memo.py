"""A call of a memoized function, as far as it is the same for all of them: `memoize.py` says what the key is.

Compiled, for a hit costs little more than a `get`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

from shmcache.engine.store import DEFAULT
from shmcache.errors import SerializationError

__all__ = ["Memo"]


@cython.final
@cython.cclass
class Memo:
    """A memoized function. Like a function it becomes a method in a class, and is pickled by its name.

    The key of a call by position with `required` to `most` arguments is `prefix + args + tail[len(args) - required :]`:
    the tail has the defaults of parameters that may be left out. Of any other call, which is all of them if `most` is
    -1, `bind` makes the key. `explain(key, args, kwargs)` raises what is wrong with a key that was refused.
    """

    def __init__(
        self,
        cache: Any,
        function: Callable[..., Any],
        ttl: object,
        prefix: tuple[Any, ...],
        tail: tuple[Any, ...],
        required: int,
        most: int,
        bind: Callable[..., tuple[Any, ...]],
        explain: Callable[..., None],
    ) -> None:
        self._get, self._set, self._ttl = cache.get, cache.set, ttl
        self._function = function
        self._prefix, self._tail, self._required, self._most = prefix, tail, required, most
        self._bind, self._explain = bind, explain
        self.hits = self.misses = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry = self.key(args, kwargs)
        value = self.look_up(entry, args, kwargs)
        if value is DEFAULT:
            value = self._function(*args, **kwargs)
            self._set(entry, value, self._ttl)
        return value

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The key of a call with these arguments."""
        count: cython.longlong = len(args)
        if kwargs or not self._required <= count <= self._most:
            return self._bind(*args, **kwargs)
        if self._tail:
            return self._prefix + args + self._tail[count - self._required :]
        return self._prefix + args

    def look_up(self, entry: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is stored under the key `entry` of a call, or DEFAULT; counted as a hit or a miss."""
        try:
            value = self._get(entry, DEFAULT)
        except SerializationError:
            self._explain(entry, args, kwargs)
            raise  # it is about the stored value
        if value is DEFAULT:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def __get__(self, instance: object, owner: type | None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> str:
        return str(self.__qualname__)  # type: ignore[attr-defined] # functools.wraps gives it one
