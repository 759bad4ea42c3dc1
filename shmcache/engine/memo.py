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

if cython.compiled:
    from cython.cimports.shmcache.engine.request import Request
    from cython.cimports.shmcache.engine.store import Store
else:
    from shmcache.engine.request import Request
    from shmcache.engine.store import Store

from shmcache.codec import pack
from shmcache.engine.store import DEFAULT
from shmcache.errors import SerializationError

__all__ = ["OTHERWISE", "Memo"]

OTHERWISE = object()  # what `Memo.find` gives for a call whose key has to be made first


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
        # With a `get` of its own it may look for something else.
        self._store = cache if type(cache).get is Store.get and "get" not in vars(cache) else None
        self._function = function
        self._prefix, self._tail, self._required, self._most = prefix, tail, required, most
        self._packed = b"".join(map(pack, prefix))
        self._bind, self._explain = bind, explain
        self.hits = self.misses = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry = None
        value = self.find(args, kwargs)
        if value is OTHERWISE:
            entry = self.key(args, kwargs)
            value = self.look_up(entry, args, kwargs)
        if value is DEFAULT:
            value = self._function(*args, **kwargs)
            self._set(self.key(args, kwargs) if entry is None else entry, value, self._ttl)
        return value

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is stored for a call, or DEFAULT; OTHERWISE, and nothing done, unless its key is a common one.

        The key is packed where it is needed, behind the packed prefix, without a tuple of it.
        """
        store: Store | None = self._store
        given: cython.longlong = len(args)
        if store is None or kwargs or not self._required <= given <= self._most:
            return OTHERWISE
        value: object = OTHERWISE
        request: Request = store._take()
        count: cython.longlong = len(self._prefix) + self._required + len(self._tail)
        if request.own_packer().pack_call(count, self._packed, args, self._tail, given - self._required):
            request.set_packed_key()
            if store._find(request, True):
                value = request.value(store._codec)
                self.hits += 1
            else:
                value = DEFAULT
                self.misses += 1
        store._give(request)
        return value

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The key of a call with these arguments."""
        given: cython.longlong = len(args)
        if kwargs or not self._required <= given <= self._most:
            return self._bind(*args, **kwargs)
        return self._prefix + args + self._tail[given - self._required :]

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

    def __repr__(self) -> str:
        return f"<memoized {self._function!r}>"

    def __get__(self, instance: object, owner: type | None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> str:
        return str(self.__qualname__)  # type: ignore[attr-defined] # functools.wraps gives it one
