"""One operation on one key, from its arguments to its result: what the store hands to a shard and gets back."""

from __future__ import annotations

try:
    import cython
except ModuleNotFoundError:
    from shmcache.engine import shim as cython

__all__ = ["Request"]


@cython.final
@cython.cclass
class Request:
    """A scratch record that the store reuses, so that an operation allocates nothing but its result.

    `key` and `body` point into `key_object`, `body_object` or `small`, which keep the memory alive; run uncompiled they
    are the bytes themselves. A value is its head, in `small` from HEAD_AT on (a msgpack header, or all of a number),
    and its body. On the way out its copy is in `scratch`.
    """

    def __init__(self) -> None:
        self.op = self.status = 0
        self.key_object: object = None
        self.body_object: object = None
        self.small = memoryview(bytearray(32))
        self.scratch = memoryview(bytearray(4096))
        self.key_size = self.key_kind = self.hash = 0
        self.head_size = self.body_size = self.value_size = 0
        self.expiry = self.version = self.slot = self.now = 0
        self.refusals = 0
        self.number = self.initial = 0
        self.keep_expiry = self.has_initial = False
        if not cython.compiled:
            self.key = self.body = b""

    def make_room(self, size: cython.ulonglong) -> int:
        """Make `scratch` at least `size` bytes long; its contents are lost."""
        if cython.cast(cython.ulonglong, len(self.scratch)) < size:
            self.scratch = memoryview(bytearray(size))
        return 0

    def release(self) -> None:
        """Let go of the objects of the operation before, and of a scratch that grew large."""
        self.key_object = self.body_object = None
        if len(self.scratch) > 1_048_576:
            self.scratch = memoryview(bytearray(4096))
