"""What is compared: one small class a peer, with how each of its operations is written.

An operation is a statement of `key` and `value`, as its users would write it, which the loops of `loops.py` take in
literally: no peer pays for a wrapper. A get leaves what it found in `result`, None for a miss. `LOAD(...)` and
`DUMP(...)` are msgpack's unpackb and packb for stores of bytes, and nothing where the value is bytes already. Where
keys have to be bytes, they are made so beforehand. Settings are those that the peer's own manual gives for speed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import psutil

from benchmarks import servers
from benchmarks.data import VALUES, packed_size

ROOT = Path(__file__).resolve().parents[1]
TTL = 1  # seconds, where entries expire: what memcached and uWSGI can count
NEVER = 86_400  # seconds, for caches that want some time to live


class Does(NamedTuple):
    """What a peer does and does not do, for the table: without it, figures cannot be compared."""

    shared: bool = False  # between processes
    expires: bool = False
    bounded: bool = False  # in entries or bytes
    evicts: bool = False  # where it is full, instead of an error
    copies: bool = True  # what is read; else the stored object itself is handed out
    note: str = ""


@dataclass(frozen=True)
class Store:
    """What a workload needs."""

    name: str  # its own; whatever is left of it in /dev/shm has it in its name
    place: Path  # a directory for files and sockets, in memory
    kind: str  # of `VALUES`
    entries: int  # the most that it will hold, or may
    max_bytes: int | None = None  # the bound, for workloads about that; else there is room to spare
    about: int | None = None  # bytes that roughly the entries take, for stores that know no bound in entries
    ttl: int | None = None

    @property
    def value(self) -> Any:
        return VALUES[self.kind]

    @property
    def size(self) -> int:
        """Bytes of a packed value."""
        return packed_size(self.value)

    @property
    def room(self) -> int:
        """Bytes that hold the entries twice."""
        return self.max_bytes or (16 << 20) + 2 * self.entries * (self.size + 256)


def module(name: str) -> Any:
    """An imported module; each process imports no other peer than its own."""
    return importlib.import_module(name)


class Peer:
    """A cache, or something that is used as one."""

    name: ClassVar[str]
    does: ClassVar[Does]
    modules: ClassVar[tuple[str, ...]] = ()
    program: ClassVar[str] = ""  # a server
    packs: ClassVar[bool] = False  # a store of bytes
    packs_bytes: ClassVar[bool] = False
    bytes_keys: ClassVar[bool] = False
    yardstick: ClassVar[bool] = False  # no cache: measures the machine
    slow: ClassVar[bool] = False  # filling it takes long: only in full runs
    only_in: ClassVar[tuple[str, ...]] = ()  # workloads
    kinds: ClassVar[tuple[str, ...]] = tuple(VALUES)  # of values that it can hold
    bounded_in_bytes: ClassVar[bool] = False
    grows: ClassVar[bool] = True  # else all memory is taken at the start
    survives_fork: ClassVar[bool] = True  # else it is closed before one
    operations: ClassVar[dict[str, str]] = {}
    create: ClassVar[str] = ""  # what a new process does from import to the first get, of {place}, {name}, {address}
    attach: ClassVar[str] = ""
    remove: ClassVar[str] = ""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def why_missing(cls) -> str | None:
        """Why it cannot be measured here."""
        for name in cls.modules:
            if importlib.util.find_spec(name) is None:
                return f"Python module {name} is not installed"
        if cls.program and shutil.which(cls.program) is None:
            return f"{cls.program} is not installed"
        return None

    @classmethod
    def command(cls, _: Store, address: str) -> list[str]:
        """How the process that measures it is started."""
        return [sys.executable, "-m", "benchmarks.runner", address]

    @classmethod
    def environment(cls) -> dict[str, str]:
        return {}

    @classmethod
    def statement(cls, operation: str, kind: str) -> str:
        """How this operation is written for values of this kind; KeyError if the peer has no such operation."""
        raw = isinstance(VALUES[kind], bytes) and not cls.packs_bytes
        load, dump = ("", "") if raw else ("unpackb", "packb")
        return cls.operations[operation].replace("LOAD", load).replace("DUMP", dump)

    def open(self) -> dict[str, Any]:
        """Make it; the names that its statements use."""
        raise NotImplementedError

    def reopen(self) -> dict[str, Any]:
        """The same in a forked child."""
        return self.open()

    def full(self) -> tuple[type[Exception], ...]:
        """What it raises when it is full."""
        return ()

    def fill_in(self, script: str, name: str) -> str:
        return script.format(place=self.store.place / name, name=name)

    def entries(self) -> int:
        """How many it holds."""
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes of memory taken by the process that has the entries."""
        return int(psutil.Process().memory_info().rss)

    def memoize(self, _: Any) -> Any:
        """A function decorated by it."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave nothing of it."""


# --- in this process ------------------------------------------------------------------------------------------------
class Dict(Peer):
    name = "dict"
    does = Does(copies=False, note="the floor: neither bound nor expiry")
    operations: ClassVar = {
        "get": "result = get(key)",
        "set": "store[key] = value",
        "delete": "drop(key, None)",
        "get_many": "result = {each: get(each) for each in key}",
    }

    def open(self) -> dict[str, Any]:
        self.stored: dict[str, Any] = {}
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        return {"store": self.stored, "get": self.stored.get, "drop": self.stored.pop}

    def entries(self) -> int:
        return len(self.stored)


MAYBE_LOAD = "\nresult = None if packed is None else LOAD(packed)"


class DictMsgpack(Dict):
    name = "dict+msgpack"
    modules = ("msgpack",)
    does = Does(note="what a copy costs without sharing")
    packs = packs_bytes = True
    operations: ClassVar = {
        "get": "packed = get(key)" + MAYBE_LOAD,
        "set": "store[key] = DUMP(value)",
        "delete": "drop(key, None)",
        "get_many": "result = {each: LOAD(packed) for each in key if (packed := get(each)) is not None}",
    }
    create = "import msgpack\nstore = {{'key': msgpack.packb('value')}}\nresult = msgpack.unpackb(store['key'])"


class LruCache(Peer):
    name = "functools.lru_cache"
    does = Does(bounded=True, evicts=True, copies=False, note="decorator only")
    operations: ClassVar = {"get": "result = load(key)", "insert": "load(key)", "call": "result = function(key)"}

    def open(self) -> dict[str, Any]:
        value = self.store.value
        self.load = functools.lru_cache(maxsize=self.store.entries)(lambda key: value)
        return {"load": self.load, "clear": self.load.cache_clear}

    def entries(self) -> int:
        return self.load.cache_info().currsize

    def memoize(self, function: Any) -> Any:
        return functools.lru_cache(maxsize=self.store.entries)(function)


class _Mapping(Peer):
    """A mapping of one of the libraries, without a lock of its own or with."""

    operations: ClassVar = {
        "get": "result = get(key)",
        "set": "cache[key] = value",
        "expire": "cache[key] = value",
        "delete": "drop(key, None)",
        "get_many": "result = {each: get(each) for each in key}",
        "call": "result = function(key)",
    }
    cache: Any

    def open(self) -> dict[str, Any]:
        self.cache = self.make()
        return {"cache": self.cache, "get": self.cache.get, "drop": self.cache.pop}

    def make(self) -> Any:
        raise NotImplementedError

    def entries(self) -> int:
        return len(self.cache)

    def memoize(self, function: Any) -> Any:
        return module(self.modules[0]).cached(self.cache)(function)


class CachetoolsTTL(_Mapping):
    name = "cachetools.TTLCache"
    modules = ("cachetools",)
    does = Does(expires=True, bounded=True, evicts=True, copies=False, note="needs a lock of yours for threads")
    operations: ClassVar = _Mapping.operations | {
        # Its `get` looks twice, which takes three times as long.
        "get": "try:\n    result = cache[key]\nexcept KeyError:\n    result = None",
        "miss": "result = get(key)",
    }
    create = "from cachetools import TTLCache\ncache = TTLCache(100, 60)\ncache['key'] = 'value'\nresult = cache['key']"

    def make(self) -> Any:
        return module("cachetools").TTLCache(self.store.entries, self.store.ttl or NEVER)


class CachetoolsLRU(_Mapping):
    name = "cachetools.LRUCache"
    modules = ("cachetools",)
    does = Does(bounded=True, evicts=True, copies=False, note="needs a lock of yours for threads")
    operations: ClassVar = {name: text for name, text in _Mapping.operations.items() if name != "expire"}

    def make(self) -> Any:
        return module("cachetools").LRUCache(self.store.entries)


class CacheboxTTL(_Mapping):
    name = "cachebox.TTLCache"
    modules = ("cachebox",)
    does = Does(expires=True, bounded=True, evicts=True, copies=False)

    def make(self) -> Any:
        # `capacity` spares it growing (its docstring).
        return module("cachebox").TTLCache(
            self.store.entries, global_ttl=self.store.ttl or NEVER, capacity=self.store.entries
        )


class CacheboxLRU(_Mapping):
    name = "cachebox.LRUCache"
    modules = ("cachebox",)
    does = Does(bounded=True, evicts=True, copies=False)
    operations: ClassVar = CachetoolsLRU.operations

    def make(self) -> Any:
        return module("cachebox").LRUCache(self.store.entries, capacity=self.store.entries)


class Theine(Peer):
    name = "theine"
    modules = ("theine",)
    does = Does(expires=True, bounded=True, evicts=True, copies=False, note="W-TinyLFU; may refuse a new entry")
    operations: ClassVar = {
        "get": "result, found = get(key)",
        "set": "put(key, value)",
        "expire": "put(key, value, ttl)",
        "delete": "drop(key)",
        "call": "result = function(key)",
    }

    def open(self) -> dict[str, Any]:
        # nolock: where there is one thread (its docstring)
        self.cache = module("theine").Cache(self.store.entries, nolock=True)
        ttl = timedelta(seconds=TTL)
        return {"get": self.cache.get, "put": self.cache.set, "drop": self.cache.delete, "ttl": ttl}

    def entries(self) -> int:
        return len(self.cache)

    def memoize(self, function: Any) -> Any:
        memoized = module("theine").Memoize(self.store.entries, None, nolock=True)(function)
        memoized.key(lambda key: key)  # the mode that its docstring recommends
        return memoized


class WarpMemory(Peer):
    name = "warp_cache memory"
    modules = ("warp_cache",)
    does = Does(expires=True, bounded=True, evicts=True, copies=False, note="decorator only; one ttl for all")
    backend: ClassVar = "memory"
    operations: ClassVar = {
        "get": "result = load(key)",
        "miss": "result = find(key)",  # a call would store what it missed
        "set": "put(value, key)",
        "expire": "put(value, key)",
        "call": "result = function(key)",
    }

    def open(self) -> dict[str, Any]:
        value = self.store.value
        self.load = self.memoize(lambda key: value)
        return {"load": self.load, "find": self.load.get, "put": self.load.set, "clear": self.load.cache_clear}

    def reopen(self) -> dict[str, Any]:
        return {"load": self.load, "find": self.load.get, "put": self.load.set}

    def entries(self) -> int:
        return int(self.load.cache_info().current_size)

    def memoize(self, function: Any) -> Any:
        function.__qualname__ = self.store.name  # names its files
        options: dict[str, Any] = {"max_size": self.store.entries, "ttl": self.store.ttl, "backend": self.backend}
        return module("warp_cache").cache(**options)(function)


class WarpShared(WarpMemory):
    name = "warp_cache shared"
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="decorator only; one ttl for all")
    backend = "shared"
    grows = False

    def memory(self) -> int:
        return size_of_files(Path("/dev/shm"), self.store.name)

    def memoize(self, function: Any) -> Any:
        function.__qualname__ = self.store.name
        return module("warp_cache").cache(
            max_size=self.store.entries,
            ttl=self.store.ttl,
            backend="shared",
            max_key_size=128,
            max_value_size=self.store.size * 2 + 64,  # larger ones are not stored, without a word
        )(function)

    def close(self) -> None:
        clean_up(self.store.name)  # it does not remove its files


# --- shared memory --------------------------------------------------------------------------------------------------
class Shmcache(Peer):
    name = "shmcache"
    modules = ("shmcache",)
    does = Does(shared=True, expires=True, bounded=True, evicts=True)
    operations: ClassVar = {
        "get": "result = get(key)",
        "set": "set(key, value)",
        "expire": "set(key, value, ttl)",
        "delete": "delete(key)",
        "get_many": "result = get_many(key)",
        "call": "result = function(key)",
    }
    bounded_in_bytes = True
    create = (
        "from shmcache import Cache\ncache = Cache('{name}', max_bytes='16MB')\n"
        "cache.set('key', 'value')\nresult = cache.get('key')"
    )
    attach = "from shmcache import Cache\ncache = Cache('{name}')\nresult = cache.get('key')"
    remove = "from shmcache import Cache\nCache.attach('{name}').unlink()\nresult = 'value'"

    def open(self) -> dict[str, Any]:
        self.cache = module("shmcache").Cache(
            self.store.name, max_bytes=self.store.room, max_entries=self.store.entries
        )
        return self.names()

    def reopen(self) -> dict[str, Any]:
        return self.names()

    def names(self) -> dict[str, Any]:
        names = ("get", "set", "delete", "get_many")
        return {name: getattr(self.cache, name) for name in names} | {"ttl": TTL}

    def entries(self) -> int:
        return len(self.cache)

    def memory(self) -> int:
        return size_of_files(Path("/dev/shm"), self.store.name)

    def memoize(self, function: Any) -> Any:
        return self.cache.memoize()(function)  # by the name that it makes, as most have it

    def close(self) -> None:
        problems = self.cache.check()
        self.cache.unlink()
        if problems:
            raise RuntimeError(f"the cache is damaged: {problems}")


class ShmcachePure(Shmcache):
    name = "shmcache uncompiled"
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="where there is no C compiler")
    only_in = ("get", "overwrite", "insert", "evict", "memoize", "start")
    slow = True

    @classmethod
    def environment(cls) -> dict[str, str]:
        return {"SHMCACHE_PURE": "1"}


class Lmdb(Peer):
    """Each operation in a transaction of its own, as processes that share it need it.

    writemap, sync=False, metasync=False: quicker, for data that need not outlive the machine
    (https://lmdb.readthedocs.io/en/release/#environment-class).
    """

    name = "lmdb"
    modules = ("lmdb", "msgpack")
    does = Does(shared=True, bounded=True, note="full is an error; a transaction per operation")
    packs = True
    bytes_keys = True
    survives_fork = False
    operations: ClassVar = {
        "get": "with begin() as transaction:\n    packed = transaction.get(key)" + MAYBE_LOAD,
        "set": "with begin(write=True) as transaction:\n    transaction.put(key, DUMP(value))",
        "delete": "with begin(write=True) as transaction:\n    transaction.delete(key)",
        "get_many": (
            "with begin() as transaction:\n"
            "    result = {each: LOAD(packed) for each in key if (packed := transaction.get(each)) is not None}"
        ),
    }
    bounded_in_bytes = True
    attach = (
        "import lmdb, msgpack\ndatabase = lmdb.open('{place}', map_size=1 << 24, writemap=True, sync=False)\n"
        "with database.begin() as transaction:\n    result = msgpack.unpackb(transaction.get(b'key'))"
    )
    create = attach.replace(
        "with",
        "with database.begin(write=True) as transaction:\n    transaction.put(b'key', msgpack.packb('value'))\nwith",
    )

    def open(self) -> dict[str, Any]:
        room = self.store.max_bytes or 2 * self.store.room  # it keeps old pages for readers
        self.database = module("lmdb").open(
            str(self.store.place / "lmdb"), map_size=room, writemap=True, sync=False, metasync=False, max_readers=64
        )
        return {"begin": self.database.begin}

    def full(self) -> tuple[type[Exception], ...]:
        return (module("lmdb").MapFullError,)

    def memory(self) -> int:
        return size_of_files(self.store.place)

    def entries(self) -> int:
        return int(self.database.stat()["entries"])

    def close(self) -> None:
        self.database.close()


class Diskcache(Peer):
    """In memory as well: its directory is in /dev/shm. Settings are its defaults, which are for speed.

    `statistics` and `tag_index` are off and `sqlite_synchronous` is 1 (http://www.grantjenks.com/docs/diskcache/tutorial.html).
    """

    name = "diskcache.Cache"
    modules = ("diskcache",)
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="SQLite; on disk, here in /dev/shm")
    operations: ClassVar = {
        "get": "result = get(key)",
        "set": "put(key, value)",
        "expire": "put(key, value, ttl)",
        "delete": "drop(key)",
        "call": "result = function(key)",
    }
    slow = True
    bounded_in_bytes = True
    attach = "from diskcache import Cache\ncache = Cache('{place}')\nresult = cache.get('key')"
    create = attach.replace("result", "cache.set('key', 'value')\nresult")

    def open(self) -> dict[str, Any]:
        most = self.store.max_bytes or self.store.about or 1 << 34
        self.cache = self.make(str(self.store.place / "diskcache"), size_limit=most)
        return self.reopen()

    def make(self, directory: str, **options: Any) -> Any:
        return module("diskcache").Cache(directory, **options)

    def reopen(self) -> dict[str, Any]:
        return {"get": self.cache.get, "put": self.cache.set, "drop": self.cache.delete, "ttl": TTL}

    def entries(self) -> int:
        return len(self.cache)

    def memory(self) -> int:
        return size_of_files(self.store.place)

    def memoize(self, function: Any) -> Any:
        return self.cache.memoize(name="bench")(function)

    def close(self) -> None:
        self.cache.close()


class DiskcacheFanout(Diskcache):
    name = "diskcache.FanoutCache"
    create, attach = (text.replace("Cache", "FanoutCache") for text in (Diskcache.create, Diskcache.attach))

    def make(self, directory: str, **options: Any) -> Any:
        return module("diskcache").FanoutCache(directory, shards=8, timeout=1, **options)


class UltraDict(Peer):
    name = "UltraDict"
    modules = ("UltraDict", "atomics")
    does = Does(shared=True, copies=False, note="a dict in each process, and a stream of changes")
    slow = True
    kinds = ("str 20", "dict 5", "1 KiB", "64 KiB")  # its buffer would have to be of many MB
    operations: ClassVar = {
        "get": "result = get(key)",
        "set": "store[key] = value",
        # `pop(key, None)` raises as well, when another process has deleted the key meanwhile
        "delete": "try:\n    del store[key]\nexcept KeyError:\n    pass",
    }

    def open(self) -> dict[str, Any]:
        # The larger the buffer, the rarer are full dumps (its README).
        options = {"buffer_size": max(10 << 20, self.store.size * 8), "full_dump_size": self.store.room}
        self.stored = module("UltraDict").UltraDict(
            name=self.store.name, create=True, shared_lock=True, auto_unlink=True, **options
        )
        return {"store": self.stored, "get": self.stored.get}

    def reopen(self) -> dict[str, Any]:
        attached = module("UltraDict").UltraDict(name=self.store.name, create=False, shared_lock=True)
        return {"store": attached, "get": attached.get}

    def entries(self) -> int:
        return len(self.stored)

    def close(self) -> None:
        self.stored.unlink()


# --- servers --------------------------------------------------------------------------------------------------------
class ManagerDict(Peer):
    name = "Manager().dict()"
    does = Does(shared=True, note="a Python process serves it")
    slow = True
    operations: ClassVar = {"get": "result = get(key)", "set": "store[key] = value", "delete": "drop(key, None)"}

    def open(self) -> dict[str, Any]:
        self.manager = module("multiprocessing").get_context("fork").Manager()
        self.stored = self.manager.dict()
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        return {"store": self.stored, "get": self.stored.get, "drop": self.stored.pop}

    def entries(self) -> int:
        return len(self.stored)

    def memory(self) -> int:
        return int(psutil.Process(self.manager._process.pid).memory_info().rss)

    def close(self) -> None:
        self.manager.shutdown()


class _Served(Peer):
    server: servers.Server
    bounded_in_bytes = True

    def fill_in(self, script: str, name: str) -> str:
        return script.format(address=self.server.address)

    def memory(self) -> int:
        return int(psutil.Process(self.server.process.pid).memory_info().rss)

    def close(self) -> None:
        self.server.stop()


REDIS_ITSELF = 2 << 20  # bytes that it counts before it holds anything


class Redis(_Served):
    """redis-py with hiredis, which it finds by itself; on a unix socket.

    https://redis.readthedocs.io/en/stable/ ("for faster performance, install redis with hiredis support")
    """

    name = "Redis"
    modules = ("redis", "hiredis", "msgpack")
    program = "redis-server"
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="unix socket, hiredis, no persistence")
    packs = True
    attach = (
        "import redis, msgpack\nclient = redis.Redis(unix_socket_path='{address}')\n"
        "result = msgpack.unpackb(client.get('key'))"
    )
    create = attach.replace("result", "client.set('key', msgpack.packb('value'))\nresult")
    operations: ClassVar = {
        "get": "packed = get(key)" + MAYBE_LOAD,
        "set": "put(key, DUMP(value))",
        "expire": "put(key, DUMP(value), ex=ttl)",
        "delete": "drop(key)",
        "get_many": "result = {each: LOAD(packed) for each, packed in zip(key, mget(key)) if packed is not None}",
    }

    def open(self) -> dict[str, Any]:
        about = REDIS_ITSELF + self.store.about if self.store.about else None
        self.server = servers.redis(self.store.place, self.store.max_bytes or about)
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        self.client = module("redis").Redis(unix_socket_path=self.server.address)
        client = self.client
        return {"get": client.get, "put": client.set, "drop": client.delete, "mget": client.mget, "ttl": TTL}

    def entries(self) -> int:
        return int(self.client.dbsize())

    def close(self) -> None:
        self.client.close()
        super().close()


class Pylibmc(_Served):
    """libmemcached: the binary protocol and no delay, as its manual's first example has it.

    https://sendapatch.se/projects/pylibmc/ (Quickstart)
    """

    name = "memcached pylibmc"
    modules = ("pylibmc", "msgpack")
    program = "memcached"
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="unix socket")
    packs = True
    attach = (
        "import pylibmc, msgpack\nclient = pylibmc.Client(['{address}'], binary=True)\n"
        "result = msgpack.unpackb(client.get('key'))"
    )
    create = attach.replace("result", "client.set('key', msgpack.packb('value'))\nresult")
    operations: ClassVar = {
        "get": "packed = get(key)" + MAYBE_LOAD,
        "set": "put(key, DUMP(value))",
        "expire": "put(key, DUMP(value), ttl)",
        "delete": "drop(key)",
        "get_many": "result = {each: LOAD(packed) for each, packed in get_multi(key).items()}",
    }

    def open(self) -> dict[str, Any]:
        self.server = servers.memcached(self.store.place, self.store.max_bytes or self.store.about)
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        behaviors = {"tcp_nodelay": True, "ketama": True}
        self.client = module("pylibmc").Client([self.server.address], binary=True, behaviors=behaviors)
        client = self.client
        return {
            "get": client.get,
            "put": client.set,
            "drop": client.delete,
            "get_multi": client.get_multi,
            "ttl": TTL,
        }

    def entries(self) -> int:
        [(_, stats)] = self.client.get_stats()
        return int(stats["curr_items"])

    def close(self) -> None:
        self.client.disconnect_all()
        super().close()


class Pymemcache(Pylibmc):
    """`no_delay` is for TCP; `default_noreply` is off, for the others wait for an answer as well.

    https://pymemcache.readthedocs.io/en/latest/apidoc/pymemcache.client.base.html
    """

    name = "memcached pymemcache"
    modules = ("pymemcache", "msgpack")
    attach = (
        "import pymemcache, msgpack\nclient = pymemcache.Client('unix:{address}')\n"
        "result = msgpack.unpackb(client.get('key'))"
    )
    create = attach.replace("result", "client.set('key', msgpack.packb('value'), noreply=False)\nresult")

    def reopen(self) -> dict[str, Any]:
        self.client = module("pymemcache.client.base").Client(f"unix:{self.server.address}", default_noreply=False)
        client = self.client
        return {
            "get": client.get,
            "put": client.set,
            "drop": client.delete,
            "get_multi": client.get_many,
            "ttl": TTL,
        }

    def entries(self) -> int:
        return int(self.client.stats()[b"curr_items"])

    def close(self) -> None:
        self.client.close()
        self.server.stop()


class Uwsgi(Peer):
    """Runs inside uWSGI, which has the cache; an item takes one block.

    `purge_lru` evicts the least recently used: only where something is evicted, for it makes every get take the lock of
    writers. `ignore_full`, or it would log a line for each eviction. `lazy_expire`, for without a master nobody sweeps.

    https://uwsgi-docs.readthedocs.io/en/latest/Caching.html
    """

    name = "uWSGI"
    does = Does(shared=True, expires=True, bounded=True, evicts=True, note="inside uWSGI only")
    modules = ("msgpack",)
    packs = True
    operations: ClassVar = {
        "get": "packed = get(key, name)" + MAYBE_LOAD,
        "set": "put(key, DUMP(value), 0, name)",
        "expire": "put(key, DUMP(value), ttl, name)",
        "delete": "drop(key, name)",
        "get_many": "result = {each: LOAD(packed) for each in key if (packed := get(each, name)) is not None}",
    }
    bounded_in_bytes = True

    @classmethod
    def program_path(cls) -> str | None:
        beside = Path(sys.executable).with_name("uwsgi")
        return str(beside) if beside.exists() else shutil.which("uwsgi")

    @classmethod
    def why_missing(cls) -> str | None:
        return super().why_missing() or (None if cls.program_path() else "uwsgi is not installed")

    @classmethod
    def geometry(cls, store: Store) -> dict[str, int]:
        """Of one item: a block for the value; its header has the key in full length."""
        block = max(64, -(-store.size // 8) * 8)
        items = store.entries + 1  # the first is never used
        if store.max_bytes is not None:
            items = store.max_bytes // (block + UWSGI_ITEM + KEY_ROOM)
        geometry = {"items": items, "blocksize": block, "keysize": KEY_ROOM, "hashsize": items, "ignore_full": 1}
        if store.ttl:
            return geometry | {"lazy_expire": 1}  # not with purge_lru, which takes a time to live for a date
        return geometry | ({"purge_lru": 1} if store.max_bytes or store.about else {})

    @classmethod
    def command(cls, store: Store, address: str) -> list[str]:
        cache = ",".join(f"{name}={value}" for name, value in cls.geometry(store).items())
        runner = ROOT / "benchmarks" / "runner.py"
        options = ("--disable-logging", "--die-on-term")
        return [
            str(cls.program_path()),
            *options,
            *("--cache2", f"name=bench,{cache}", "--pyrun", str(runner), "--pyargv", address),
        ]

    def open(self) -> dict[str, Any]:
        uwsgi = module("uwsgi")
        self.items = self.geometry(self.store)["items"]
        self.uwsgi = uwsgi
        return self.reopen()

    def reopen(self) -> dict[str, Any]:
        uwsgi = self.uwsgi
        return {
            "get": uwsgi.cache_get,
            "put": uwsgi.cache_update,
            "drop": uwsgi.cache_del,
            "name": "bench",
            "ttl": TTL,
        }

    def entries(self) -> int:
        return len(self.uwsgi.cache_keys("bench"))

    def memory(self) -> int:
        geometry = self.geometry(self.store)
        return geometry["items"] * (geometry["blocksize"] + geometry["keysize"] + UWSGI_ITEM)


UWSGI_ITEM = 88  # bytes of an item's header without its key (struct uwsgi_cache_item)
KEY_ROOM = 64  # bytes, longer than any key here


# --- yardsticks -----------------------------------------------------------------------------------------------------
class Copy(Dict):
    name = "bytes(memoryview)"
    does = Does(note="the bandwidth of this machine")
    yardstick = True
    kinds = ("64 KiB", "1 MiB")
    operations: ClassVar = {"get": "result = bytes(store[key])", "set": "store[key] = memoryview(bytearray(value))"}


class Nothing(Dict):
    name = "(empty loop)"
    does = Does(note="what the loop itself takes")
    yardstick = True
    operations: ClassVar = dict.fromkeys(("get", "miss", "set", "delete", "get_many", "call"), "pass")

    def memoize(self, function: Any) -> Any:
        return function


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        *(Shmcache, ShmcachePure, Dict, DictMsgpack, LruCache, CachetoolsTTL, CachetoolsLRU, CacheboxTTL, CacheboxLRU),
        *(Theine, WarpMemory, WarpShared, Uwsgi, Lmdb, UltraDict, Diskcache, DiskcacheFanout),
        *(Pylibmc, Pymemcache, Redis, ManagerDict, Copy, Nothing),
    )
}


def size_of_files(place: Path, part_of_name: str = "") -> int:
    """Bytes that the files in a directory take, or those with this in their names."""
    files = [file for file in place.rglob(f"*{part_of_name}*" if part_of_name else "*") if file.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files)


def clean_up(name: str) -> None:
    """Remove what a process that ended early left of stores of this name."""
    for file in Path("/dev/shm").glob(f"*{name}*"):
        with contextlib.suppress(OSError):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                os.unlink(file)
