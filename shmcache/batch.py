"""A group of operations performed together, each shard's lock taken once; what `Cache.batch()` returns."""

from __future__ import annotations

import warnings
from typing import Any

from shmcache.engine import layout
from shmcache.engine.store import DEFAULT, Store

__all__ = ["Batch", "Pending"]


class Pending:
    """The result-to-be of one operation of a batch."""

    def __init__(self, operation: tuple[int, object, object, object], default: Any = None) -> None:
        self._operation = operation
        self._default = default
        self._outcome: tuple[int, Any] | None = None

    @property
    def value(self) -> Any:
        """What the operation returned; raises what it raised, or RuntimeError before the batch has ended."""
        if self._outcome is None:
            raise RuntimeError("the batch has not been performed: results are there after its `with` block has ended")
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

    Operations on the same key keep their order. Each is a transaction of its own: the group is not atomic. Arguments
    that cannot be serialized raise at the end of the block, before anything has been performed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[Pending] = []

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
        return self.incr(key, -delta, initial, ttl)

    def __len__(self) -> int:
        return len(self._pending)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pending, self._pending = self._pending, []
        if kind is None and pending:
            outcomes = self._store._perform([each._operation for each in pending])
            for each, outcome in zip(pending, outcomes, strict=True):
                each._outcome = outcome
            for status, stopped in outcomes:
                if status >= layout.UNDONE:
                    raise stopped

    def __del__(self) -> None:
        if self._pending:
            warnings.warn(
                f"a batch of {len(self._pending)} operations was never performed: use it in a `with` block",
                ResourceWarning,
                stacklevel=2,
            )

    def _add(self, operation: tuple[int, object, object, object], default: Any = None) -> Pending:
        pending = Pending(operation, default)
        self._pending.append(pending)
        return pending
