"""What this process has attached to: one attachment a cache, from the first `Cache` object that uses it to the last.

All `Cache` objects of a name share it, for a process has one descriptor of a lock file and one line of a process table.
It is detached when the last of them is closed or collected, or the process ends; a forked child goes on with what it
has from its parent, under an identity of its own. The files are `segment.py`'s and the descriptors `descriptors.py`'s.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import posix_ipc

from shmcache import segment
from shmcache.descriptors import Descriptor, LockFile, standard_taken
from shmcache.engine import layout
from shmcache.engine.bytelock import Guard, forked_within, is_setting_up, under_setup_lock
from shmcache.engine.layout import Geometry
from shmcache.engine.membership import Member, Registry, nobody
from shmcache.engine.primitives import load, process_epoch
from shmcache.engine.repair import inspect_locked
from shmcache.engine.shard import Shard
from shmcache.engine.store import is_compiled
from shmcache.errors import CacheNotFound, CorruptSegment, GeometryMismatch, ShmcacheError
from shmcache.log import warn
from shmcache.segment import Wish

__all__ = ["Attachment", "attach", "detach_dropped", "release"]


class Attachment:
    """This process's view of one cache: the mapping, the lock file, the process table and the shards."""

    def __init__(self, name: str, file: Descriptor, lock_file: LockFile, geometry: Geometry) -> None:
        self.name = name
        self.file: Descriptor | None = file
        self.lock_file: LockFile | None = lock_file
        self.geometry = geometry
        # The `Cache` objects that work on it, by their id: a subclass may compare them as it likes.
        self.users: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.left_to_parent = False
        self.was_reported = False  # that its files are gone
        self.is_dropped = False  # collected, and yet to be detached
        self._detached = False
        try:
            self.data = memoryview(mmap.mmap(file.fileno(), geometry.file_bytes))
        except BaseException:
            file.close_own()
            raise
        self.words = self.data.cast("Q")
        self.registry = Registry(self.words, lock_file.fd, geometry.processes)
        self.member = Member(self.words, self.registry)
        # Read once: what the header says later on may be nonsense.
        self.ephemeral = bool(load(self.words, layout.H_FLAGS) & layout.FLAG_EPHEMERAL)
        self.default_ttl_ns = load(self.words, layout.H_DEFAULT_TTL)
        self.secret = (load(self.words, layout.H_SECRET), load(self.words, layout.H_SECRET + 1))
        self.sleepers = [segment.sleeper(self.name, number) for number in range(geometry.shards)]
        self.guard = Guard(lock_file.fd)
        self.shards = [
            Shard(
                self.words, self.data, geometry, number, self.secret, self.member, sleeper, self.guard, inspect_locked
            )
            for number, sleeper in enumerate(self.sleepers)
        ]
        lock_file.add_user(self)
        _all[id(self)] = self

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, modules that detaching needs may be emptied; `atexit` has seen to it by then.
        if hasattr(self, "shards") and not self._detached and not _is_finalizing():
            self.is_dropped = True
            _dropped.append(self)
            detach_dropped()

    @property
    def segment_fd(self) -> int:
        """The descriptor of the segment, -1 once detached."""
        return -1 if self.file is None else self.file.fileno()

    @property
    def lock_fd(self) -> int:
        """The descriptor of the lock file, -1 once detached."""
        return -1 if self.lock_file is None else self.lock_file.fd

    def after_fork(self) -> None:
        """In a forked child: do nothing in the parent's name.

        A child that a signal handler forked in the midst of an operation may return from the handler, and would go on
        with it, in a section that is the parent's. Uncompiled, what it then stores is an error, and it attaches anew.
        """
        if self.left_to_parent:
            return  # already, when its parent was forked
        self.member.disinherit()
        for shard in self.shards:
            shard.after_fork()
        if (is_setting_up() or self.is_entered()) and not is_compiled():
            self.left_to_parent = True
            self.words.release()
            self.data.release()

    def is_entered(self) -> bool:
        """Uncompiled: whether this thread is in an operation; in a forked child, whether it was when it forked."""
        return any(shard.is_entered() for shard in self.shards)

    def is_current(self) -> bool:
        """Whether both files still have their names, and this process its descriptors (a daemon may close them all)."""
        file, lock_file = self.file, self.lock_file
        if self.left_to_parent or file is None or lock_file is None:
            return False
        return file.link_count() > 0 and lock_file.descriptor.link_count() > 0

    def disown(self) -> None:
        """Forget descriptors that somebody has closed: their numbers, and the locks that went with them, are lost."""
        if self.left_to_parent:
            self.close_files()
        if self.file is None or self.lock_file is None:
            return
        lock_is_lost = self.lock_file.descriptor.is_lost()
        if lock_is_lost:
            self.member.forget()
        if lock_is_lost or self.file.is_lost():
            _kept.append(self.data)  # the mapping has a duplicate of its descriptor, whose number may be another's too

    def check(self, wish: Wish) -> None:
        """Raise GeometryMismatch unless the live cache is what the caller asked for, as far as it asked."""
        here = self.geometry
        fields = ("max_bytes", "max_entries", "shards", "eviction")
        asked = {field: getattr(wish, field) for field in fields}
        differing = {field: value for field, value in asked.items() if value not in (None, getattr(here, field))}
        if differing:
            wanted = ", ".join(f"{key}={value!r}" for key, value in differing.items())
            live = ", ".join(f"{key}={getattr(here, key)!r}" for key in differing)
            raise GeometryMismatch(
                f"a live cache {self.name!r} has {live}, but {wanted} was asked for: attach without these arguments, "
                f"use another name, or stop all processes that use it and remove it with `shmcache unlink {self.name}`"
            )

    def detach(self) -> None:
        """Give the process's place back, and unlink an ephemeral cache nobody uses. The mutex of the name is held."""
        if self._detached:
            return
        if not self.left_to_parent:
            self._wait_for_own_threads()
        self._detached = True
        if _attachments.get(self.name) is self:
            del _attachments[self.name]
        identity = None if self.lock_file is None else self.lock_file.identity
        self.disown()
        self.member.resign()
        removable = self.ephemeral and self.is_current()
        self.registry.fd = self.guard.fd = -1  # the number may be another file's soon
        self.close_files()
        if removable:
            with contextlib.suppress(Exception):
                segment.remove_if_unused(self.name, identity)
        # The views of the mapping go with the last object that has one; an mmap cannot be closed under a view.

    def forget_memory(self) -> None:
        """Drop all views of the mapping that are reached from here, once the last user has detached."""
        if self._detached:
            self.shards = []
            self.registry.words = self.words = self.data = memoryview(b"").cast("Q")
            self.member = nobody()  # a fork may come at any time

    def _wait_for_own_threads(self) -> None:
        """Let no thread of this process take a lock any more, and wait for one that has: nobody could tell it lives.

        Compiled code lets no other thread run while it has a lock.
        """
        if is_compiled():
            return
        fd = self.guard.fd
        self.guard.close()
        try:
            for shard in self.shards:
                shard.wait_for_own_thread()
        except BaseException:  # it is this very thread, interrupted by a signal handler or a finalizer
            self.guard.fd = fd
            raise

    def close_files(self) -> None:
        """Close the descriptors, that of the lock file unless another attachment of this process has it."""
        if self.file is not None:
            self.file.close_own()
        if self.lock_file is not None:
            self.lock_file.users.discard(self)
            self.lock_file.close_unless_used()
        self.file = self.lock_file = None


_kept: list[memoryview] = []  # mappings that are never unmapped
_attachments: weakref.WeakValueDictionary[str, Attachment] = weakref.WeakValueDictionary()
_all: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()  # also those that are replaced
_dropped: deque[Attachment] = deque()


def _living(attachments: weakref.WeakValueDictionary[Any, Attachment]) -> list[Attachment]:
    """A copy that other threads may change the original of."""
    return [attachment for each in attachments.valuerefs() if (attachment := each()) is not None]


# --- attaching ------------------------------------------------------------------------------------------------------
def attach(wish: Wish, user: object) -> Attachment:
    """This process's attachment to the cache, created if need be and allowed. `user` has it until `release`."""
    segment.check_name(wish.name)
    try:
        with segment.mutex_of(wish.name):
            return _attach(wish, user)
    finally:
        detach_dropped()


def _attach(wish: Wish, user: object) -> Attachment:
    attachment = _attachments.get(wish.name)
    was_user = attachment is not None and id(user) in attachment.users
    if attachment is not None:
        is_abandoned = attachment.is_dropped or not attachment.users  # it is being collected just now
        attachment.users[id(user)] = user  # before a finalizer can close the last one
        if is_abandoned:
            attachment.detach()
        if not attachment.is_current():
            if not was_user:
                attachment.users.pop(id(user), None)
            attachment.disown()
            attachment, was_user = None, False
    if attachment is None:
        try:
            with standard_taken():
                attachment = _attachments[wish.name] = _open(wish)
        except ShmcacheError:
            raise
        except (OSError, posix_ipc.Error) as error:
            raise segment.explained(error, wish.name) from error
    try:
        attachment.users[id(user)] = user
        attachment.member.join(wish.timeout)  # a forked child has it from its parent, whose line is not the child's
        attachment.check(wish)
    except BaseException:
        if not was_user:
            attachment.users.pop(id(user), None)
        if not attachment.users:
            attachment.detach()
        raise
    return attachment


def release(attachment: Attachment, user: object) -> None:
    """Undo one `attach`; the last one detaches."""
    try:
        with segment.mutex_of(attachment.name):
            attachment.users.pop(id(user), None)
            if not attachment.users:
                attachment.detach()
    finally:
        detach_dropped()


def detach_dropped() -> None:
    """Detach what was collected, unless this thread is in the midst of something: it might wait for itself.

    (Or wait, within what another thread waits for, for what that thread has: a collector runs anywhere.)
    """
    while _dropped and not _is_busy():
        try:
            attachment = _dropped.popleft()
        except IndexError:  # another thread was faster
            return
        with segment.mutex_of(attachment.name), contextlib.suppress(Exception):
            attachment.detach()


def _is_busy() -> bool:
    return segment.has_mutex() or is_setting_up() or any(each.is_entered() for each in _living(_all))


def _open(wish: Wish) -> Attachment:
    while True:
        with segment.open_lock_file(wish.name, wish.create) as lock_file:
            attachment = under_setup_lock(lock_file.fd, wish.timeout, partial(_open_if_named, wish, lock_file))
            if attachment is None:
                continue  # somebody has unlinked it meanwhile
            try:
                attachment.member.join(wish.timeout)
                if attachment.is_current():
                    if attachment.ephemeral:
                        _start_reaper(lock_file.fd, attachment)
                    return attachment
            except BaseException:
                attachment.detach()
                raise
            attachment.detach()


def _start_reaper(lock_fd: int, attachment: Attachment) -> None:
    from shmcache.reaper import start_reaper  # seldom

    start_reaper(lock_fd, segment.file_paths(attachment.name, attachment.geometry.shards))


def _open_if_named(wish: Wish, lock_file: LockFile) -> Attachment | None:
    """With the setup lock: attach or create; None if that has to begin again, with another lock file."""
    if not segment.is_named(lock_file, wish.name):
        return None
    try:
        try:
            file, geometry = segment.open_segment(wish, lock_file)
            return Attachment(wish.name, file, lock_file, geometry)
        except CacheNotFound:
            if not wish.create:
                raise
        except segment.Unfinished:
            # We hold the setup lock, so whoever began is gone.
            if not wish.create:
                raise CorruptSegment(
                    f"the creation of cache {wish.name!r} was never finished: `Cache({wish.name!r})` makes it anew, "
                    f"`shmcache unlink {wish.name}` removes it"
                ) from None
            segment.remove_segment(wish.name)
        return None if segment.replace_used(lock_file, wish.name) else _create(wish, lock_file)
    except BaseException:
        if wish.create:
            segment.remove_lock_file_of_nothing(wish.name, lock_file)
        raise


def _create(wish: Wish, lock_file: LockFile) -> Attachment:
    epoch = process_epoch()
    attachment: Attachment | None = None
    try:
        file, geometry = segment.create_segment(wish, lock_file)
        attachment = Attachment(wish.name, file, lock_file, geometry)
        if process_epoch() != epoch:
            raise forked_within()  # by a signal handler: the cache is the parent's, and perhaps in use by now
        for shard in attachment.shards:
            shard.format(segment.random_word() >> 4 << 1)
        if not all(sleeper.create() for sleeper in attachment.sleepers):
            warn(
                "no semaphores could be created for cache %r: who waits for a lock is not woken, but looks again after "
                "half a millisecond",
                wish.name,
            )
        if wish.ephemeral:
            segment.use(wish.name, lock_file, wish.timeout)
        segment.complete(attachment.words)
        return attachment
    except BaseException:
        if attachment is not None:
            file.close_own()
            lock_file.users.discard(attachment)
        if process_epoch() == epoch:
            segment.remove_files(wish.name)
        raise


# --- forks and exits ------------------------------------------------------------------------------------------------
def _after_fork_in_child() -> None:
    for attachment in _living(_all):
        attachment.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _at_exit() -> None:
    """Say that this process leaves. Functions registered earlier, and daemon threads, may still use its caches."""
    for attachment in _living(_attachments):
        with contextlib.suppress(Exception):
            if attachment.ephemeral and threading.active_count() == 1:
                attachment.detach()
            else:  # what is locked is given back by the kernel, and a reaper removes what is ephemeral
                attachment.registry.take_leave()
