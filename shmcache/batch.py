"""A group of operations performed together, each shard's lock taken once; what `Cache.batch()` returns."""

from __future__ import annotations

from typing import Any

from shmcache.engine import layout
from shmcache.engine.store import DEFAULT, Store

__all__ = ["Batch", "Pending"]

# What state a batch is in, as its errors say it.
_NEW = "the `with` block of the batch has not begun"
_OPEN = "the `with` block of the batch has not ended"


class Pending:
    """The result-to-be of one operation of a batch."""

    def __init__(self, batch: Batch, operation: tuple[int, object, object, object], default: Any = None) -> None:
        self._batch = batch
        self._operation = operation
        self._default = default
        self._outcome: tuple[int, Any] | None = None

    @property
    def value(self) -> Any:
        """What the operation returned; raises what it raised, or RuntimeError if the batch was not performed."""
        if self._outcome is None:
            raise RuntimeError(f"there is no result: {self._batch._state}")
        status, value = self._outcome
        op = self._operation[0]
        if isinstance(value, Exception):
            raise value
        if op == layout.OP_READ:
            return value if status == layout.DONE else self._default
        if op == layout.OP_INCR:
            return value
        return status == layout.DONE


class Batch:
    """Collects operations, and performs them when its `with` block ends without an exception.

    The operations are get, set, add, replace, delete, touch, incr and decr; each returns a `Pending`, whose `value` is
    there after the block. Outside the block they raise RuntimeError, and a batch is for one block.

    Operations on the same key keep their order. Each is a transaction of its own: the group is not atomic. Arguments
    that cannot be serialized, or are of a wrong type, raise at the end of the block, before anything is performed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[Pending] = []
        self._state = _NEW

    def get(self, key: object, default: Any = None) -> Pending:
        """As `Cache.get`."""
        return self._add((layout.OP_READ, key, None, None), default)

    def set(self, key: object, value: object, ttl: object = DEFAULT) -> Pending:
        """As `Cache.set`; the result is True."""
        return self._add((layout.OP_SET, key, value, ttl))

    def add(self, key: object, value: object, ttl: object = DEFAULT) -> Pending:
        """As `Cache.add`."""
        return self._add((layout.OP_ADD, key, value, ttl))

    def replace(self, key: object, value: object, ttl: object = DEFAULT) -> Pending:
        """As `Cache.replace`."""
        return self._add((layout.OP_REPLACE, key, value, ttl))

    def delete(self, key: object) -> Pending:
        """As `Cache.delete`."""
        return self._add((layout.OP_DELETE, key, None, None))

    def touch(self, key: object, ttl: object = DEFAULT) -> Pending:
        """As `Cache.touch`."""
        return self._add((layout.OP_TOUCH, key, None, ttl))

    def incr(self, key: object, delta: int = 1, initial: int | None = None, ttl: object = DEFAULT) -> Pending:
        """As `Cache.incr`."""
        return self._add((layout.OP_INCR, key, (delta, initial), ttl))

    def decr(self, key: object, delta: int = 1, initial: int | None = None, ttl: object = DEFAULT) -> Pending:
        """As `Cache.decr`."""
        # What is no int is left to be refused where the batch is performed, as that of incr is.
        return self.incr(key, -delta if type(delta) is int else delta, initial, ttl)

    def __len__(self) -> int:
        return len(self._pending)

    def __enter__(self) -> Batch:
        if self._state != _NEW:
            raise RuntimeError(f"a batch is for one `with` block, and {self._state}: make another one, cache.batch()")
        self._state = _OPEN
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pending, self._pending = self._pending, []
        if kind is not None:
            self._state = f"the `with` block of the batch raised {kind.__name__}, so nothing was performed"
            return
        self._state = "the `with` block of the batch has ended"
        if not pending:
            return
        try:
            outcomes = self._store._perform([each._operation for each in pending])
        except BaseException as error:
            self._state = f"the batch failed at the end of its `with` block, with {type(error).__name__}"
            raise
        for each, outcome in zip(pending, outcomes, strict=True):
            each._outcome = outcome
        for status, stopped in outcomes:
            if status >= layout.UNDONE:
                raise stopped

    def _add(self, operation: tuple[int, object, object, object], default: Any = None) -> Pending:
        if self._state != _OPEN:
            raise RuntimeError(
                f"a batch takes operations inside its `with` block only, and {self._state}: write "
                f"`with cache.batch() as batch:`"
            )
        pending = Pending(self, operation, default)
        self._pending.append(pending)
        return pending
