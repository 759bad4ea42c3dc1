"""Bad input and limits: each a typed error that says what is wrong and what to do, and nothing is lost by it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

import shmcache
from shmcache import (
    Cache,
    CacheClosed,
    CacheNotFound,
    CorruptSegment,
    GeometryMismatch,
    IncompatibleSegment,
    KeyTooLarge,
    LockTimeout,
    SegmentTooLarge,
    SerializationError,
    SharedMemoryUnavailable,
    ShmcacheError,
    TooManyProcesses,
    ValueTooLarge,
    is_compiled,
    parse_size,
    segment,
)
from shmcache.engine import layout
from tests.conftest import Clock, files_left, new_name

MakeCache = Callable[..., Cache]


def identify(value: object) -> str:
    """The name of a case: never a repr with an address in it, on which two test processes could not agree."""
    return type(value).__name__


class Number(IntEnum):
    """An int that is more than an int."""

    ONE = 1


class Text(str):
    """A str that is more than a str."""

    __slots__ = ()


@pytest.fixture
def cache(make_cache: MakeCache, clock: Clock) -> Iterator[Cache]:
    """A cache with one old entry, which must still be there at the end, and nothing else."""
    cache = make_cache(max_bytes="128KB", max_entries=50, clock=clock)
    cache.set("old", "value", ttl=500)
    yield cache
    assert dict(cache.items()) == {"old": "value"}
    assert cache.ttl("old") == 500.0
    assert cache.check() == []


def test_every_error_is_a_shmcache_error_and_the_closest_builtin() -> None:
    closest: dict[type[Exception], tuple[type[Exception], ...]] = {
        CacheClosed: (ValueError,),
        CacheNotFound: (KeyError,),
        GeometryMismatch: (ValueError,),
        IncompatibleSegment: (ValueError,),
        CorruptSegment: (ValueError,),
        SegmentTooLarge: (MemoryError,),
        ValueTooLarge: (ValueError,),
        KeyTooLarge: (ValueError,),
        LockTimeout: (TimeoutError,),
        TooManyProcesses: (OSError,),
        SharedMemoryUnavailable: (OSError,),
        SerializationError: (TypeError, ValueError),
    }
    for error, builtins in closest.items():
        assert issubclass(error, (ShmcacheError, *builtins))
        assert all(issubclass(error, builtin) for builtin in builtins)
        assert str(error("what happened")) == "what happened"
        assert str(pickle.loads(pickle.dumps(error("what happened")))) == "what happened"


# --- keys -----------------------------------------------------------------------------------------------------------
def with_key(cache: Cache, key: Any) -> list[Callable[[], Any]]:
    """Every operation that takes a key."""

    def in_batch() -> None:
        with cache.batch() as batch:
            batch.set("new", 1)
            batch.get(key)

    def remove() -> None:
        del cache[key]

    return [
        lambda: cache.get(key),
        lambda: cache.gets(key),
        lambda: cache[key],
        lambda: key in cache,
        lambda: cache.set(key, 1),
        lambda: cache.__setitem__(key, 1),
        lambda: cache.add(key, 1),
        lambda: cache.replace(key, 1),
        lambda: cache.cas(key, 1, 2),
        lambda: cache.delete(key),
        remove,
        lambda: cache.pop(key, None),
        lambda: cache.touch(key),
        lambda: cache.ttl(key),
        lambda: cache.incr(key, initial=0),
        lambda: cache.decr(key, initial=0),
        lambda: cache.info(key),
        lambda: cache.get_or_set(key, lambda: 1),
        lambda: cache.get_many(["old", key]),
        lambda: cache.delete_many(["old", key]),
        in_batch,
    ]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ([1], "list is not a key type; keys are str, bytes, int, float, bool, None, and tuples of these"),
        ({"a": 1}, "dict is not a key type"),
        ({1}, "set is not a key type"),
        (bytearray(b"k"), "bytearray is not a key type"),
        (object(), "object is not a key type"),
        (Decimal(1), "decimal.Decimal is not a key type"),
        (Number.ONE, "Number is not a key type"),
        (Text("k"), "Text is not a key type"),
        ((1, ("a", [2])), r"key\[1\]\[1\]: list is not a key type"),
        (math.nan, "NaN equals nothing"),
        ((1, math.nan), r"key\[1\]: NaN equals nothing"),
        ("lone \ud800", "UTF-8"),
        (("lone \ud800",), "UTF-8"),
    ],
    ids=identify,
)
def test_keys_of_a_wrong_type(cache: Cache, key: Any, says: str) -> None:
    for operation in with_key(cache, key):
        with pytest.raises(SerializationError, match=says):
            operation()


def test_keys_too_long(cache: Cache) -> None:
    for key in ("k" * 65_536, b"k" * 70_000, ("k" * 65_536,)):
        for operation in with_key(cache, key):
            with pytest.raises(KeyTooLarge, match=r"at most 65,535 bytes, this one has [67]\d,\d{3}: hash it"):
                operation()


# --- values ---------------------------------------------------------------------------------------------------------
def with_value(cache: Cache, value: Any) -> list[Callable[[], Any]]:
    """Every operation that takes a value."""

    def in_batch() -> None:
        with cache.batch() as batch:
            batch.delete("old")
            batch.set("new", value)

    return [
        lambda: cache.set("old", value),
        lambda: cache.set("new", value),
        lambda: cache.add("old", value),
        lambda: cache.add("new", value),
        lambda: cache.replace("old", value),
        lambda: cache.cas("old", value, cache.info("old").version),
        lambda: cache.get_or_set("new", lambda: value),
        lambda: cache.set_many({"new": 1, "old": value}),
        in_batch,
    ]


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)
PICKLE_HINT = r'open the cache with Cache\(\.\.\., serializer="pickle"\)'


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), f"cannot store value: object is not a type that msgpack can keep; .*{PICKLE_HINT}"),
        ({"a": [1, {"b": object()}]}, rf"cannot store value\['a'\]\[1\]\['b'\]: object.*{PICKLE_HINT}"),
        ((1, {len}), rf"value\[1\]\{{<built-in function len>\}}: builtin_function_or_method.*{PICKLE_HINT}"),
        ({Number.ONE: 1}, rf"value\[key .*\]: .*Number would come back as a plain int; .*{PICKLE_HINT}"),
        ([Text("x")], rf"value\[0\]: .*Text would come back as a plain str; .*{PICKLE_HINT}"),
        ("lone \ud800", "without a UTF-8 form"),
        (["lone \ud800"], r"value\[0\]: a str with the lone surrogate"),
        (RECURSIVE, "contains itself|too deep|levels deep"),
    ],
    ids=["object", "path", "set", "key", "subclass", "surrogate", "nested surrogate", "recursive"],
)
def test_values_that_cannot_be_serialized(cache: Cache, value: Any, says: str) -> None:
    for operation in with_value(cache, value):
        with pytest.raises(SerializationError, match=says):
            operation()


def test_values_larger_than_the_cache(cache: Cache) -> None:
    most = cache._attachment.geometry.max_entry_bytes
    before = cache.info("old")
    operations: list[Callable[[bytes], Any]] = [
        lambda value: cache.set("old", value),
        lambda value: cache.set("new", value),
        lambda value: cache.add("new", value),
        lambda value: cache.replace("old", value),
        lambda value: cache.cas("old", value, before.version),
        lambda value: cache.set_many({"old": value}),
        lambda value: cache.get_or_set("new", lambda: value),
    ]
    for size in (most, most + 1, 10 * most):
        for operation in operations:
            with pytest.raises(ValueTooLarge, match=rf"{most:,} bytes.*before, if any, is kept.*larger max_bytes"):
                operation(b"x" * size)
    assert cache.info("old") == before
    assert cache.stats().evictions == 0


def test_blocks_exhausted_and_entries_reached_are_no_errors(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="128KB", max_entries=50)
    for number in range(200):
        cache.set(number, b"x" * 20_000)
        assert len(cache) <= 50
    assert 199 in cache
    for number in range(200):
        cache.set(number, number)
    assert sorted(cache) == list(range(150, 200))


# --- ttl ------------------------------------------------------------------------------------------------------------
def with_ttl(cache: Cache, ttl: Any) -> list[Callable[[], Any]]:
    """Every operation that takes a ttl."""

    def in_batch(method: str, *arguments: Any) -> None:
        with cache.batch() as batch:
            batch.delete("old")
            getattr(batch, method)("old", *arguments, ttl=ttl)

    return [
        lambda: cache.set("old", 1, ttl),
        lambda: cache.set("new", 1, ttl=ttl),
        lambda: cache.add("new", 1, ttl),
        lambda: cache.replace("old", 1, ttl),
        lambda: cache.cas("old", 1, cache.info("old").version, ttl),
        lambda: cache.touch("old", ttl),
        lambda: cache.incr("new", 1, 0, ttl),
        lambda: cache.decr("new", 1, 0, ttl),
        lambda: cache.set_many({"new": 1, "old": 2}, ttl),
        lambda: cache.get_or_set("new", lambda: 1, ttl),
        lambda: cache.memoize(ttl=ttl)(len)("abc"),
        lambda: in_batch("set", 1),
        lambda: in_batch("touch"),
        lambda: in_batch("incr", 1, 0),
        lambda: Cache(new_name(), max_bytes="1MB", default_ttl=ttl),
    ]


@pytest.mark.parametrize("ttl", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, 1e30, 10**400])
def test_ttls_out_of_range(cache: Cache, ttl: float) -> None:
    for operation in with_ttl(cache, ttl):
        with pytest.raises(ValueError, match=r"ttl=.*(expected a positive, finite number|146 years).*None for no exp"):
            operation()


@pytest.mark.parametrize("ttl", ["60", b"60", True, False, [60], Decimal(60), object()], ids=identify)
def test_ttls_of_a_wrong_type(cache: Cache, ttl: Any) -> None:
    for operation in with_ttl(cache, ttl):
        with pytest.raises(TypeError, match="ttl is a number of seconds or None for no expiry, not "):
            operation()


# --- versions and steps ---------------------------------------------------------------------------------------------
def test_versions_and_steps_of_a_wrong_type(cache: Cache) -> None:
    for version in ("1", 1.0, b"1", [1]):
        with pytest.raises(TypeError):
            cache.cas("old", 1, version)  # type: ignore[arg-type]
    for number in (0, 1, 2**63, 2**64, 2**70, -1):
        with contextlib.suppress(ValueError, OverflowError):
            assert cache.cas("old", 1, number) is False
    steps: list[Any] = [1.5, "1", None, True, b"1"]
    for step in steps:
        for operation in (cache.incr, cache.decr):
            with pytest.raises(TypeError):
                operation("new", step, 0)
    with pytest.raises(TypeError):
        cache.incr("new", 1, 1.5)  # type: ignore[arg-type]
    with pytest.raises(OverflowError, match="64 signed bits"):
        cache.incr("new", 1, 2**63 - 1)


# --- what a cache is made with --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "max_bytes=0.*more than 0 bytes"),
        (-1, "max_bytes=-1.*more than 0 bytes"),
        ("0", "more than 0 bytes"),
        ("0MB", "more than 0 bytes"),
        ("-5MB", "'-5MB' is no size: expected a number and a unit, such as '64MB'"),
        ("12 parsecs", "'12 parsecs' is no size: expected a number and a unit"),
        ("", "'' is no size"),
        ("MB", "'MB' is no size"),
        ("nan", "'nan' is no size"),
        ("1e6", "'1e6' is no size"),
        ("9" * 400 + "MB", "max_bytes"),
        (1, "max_bytes=1 is too small.*at least"),
        (5_000, "max_bytes=5000 is too small.*at least"),
    ],
)
def test_sizes_that_are_none(size: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Cache(new_name(), max_bytes=size)


@pytest.mark.parametrize("size", [1.5, None, True, b"1MB", [1]], ids=repr)
def test_sizes_of_a_wrong_type(size: Any) -> None:
    with pytest.raises(TypeError, match="size is an int of bytes or a string like '64MB', not "):
        parse_size(size, "size")


def test_the_smallest_size_is_the_one_the_error_names(make_cache: MakeCache) -> None:
    shapes: list[dict[str, Any]] = [{"max_entries": 1}, {"max_entries": 100}, {"max_entries": 100, "shards": 4}]
    for options in shapes:
        with pytest.raises(ValueError, match="too small for max_entries") as caught:
            Cache(new_name(), max_bytes=1_000, **options)
        least = int(str(caught.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        with pytest.raises(ValueError, match="too small"):
            Cache(new_name(), max_bytes=least - 1, **options)
        cache = make_cache(max_bytes=least, **options)
        cache.set("k", "v")
        assert cache.get("k") == "v"


@pytest.mark.parametrize(
    ("option", "value", "error", "says"),
    [
        ("max_entries", 0, ValueError, "max_entries=0: expected 1 to"),
        ("max_entries", -1, ValueError, "max_entries=-1"),
        ("max_entries", 2**40, ValueError, "max_entries"),
        ("max_entries", 10**6, ValueError, "too small for max_entries=1000000"),
        ("max_entries", "5", TypeError, "max_entries is an int, not str"),
        ("max_entries", 5.0, TypeError, "max_entries is an int, not float"),
        ("max_entries", True, TypeError, "max_entries is an int, not bool"),
        ("shards", 0, ValueError, "shards=0: expected 1 to 64"),
        ("shards", 65, ValueError, "shards=65: expected 1 to 64"),
        ("shards", "2", TypeError, "shards is an int"),
        ("eviction", "random", ValueError, "eviction='random': expected one of 'lru'"),
        ("serializer", "yaml", ValueError, "unknown serializer 'yaml': choose 'msgpack', 'pickle'"),
        ("serializer", 5, TypeError, "a serializer is 'msgpack', 'pickle', or an object"),
        ("lock_timeout", 0, ValueError, "lock_timeout=0"),
        ("lock_timeout", -1, ValueError, "lock_timeout=-1"),
        ("lock_timeout", math.nan, ValueError, "lock_timeout=nan"),
        ("lock_timeout", math.inf, ValueError, "lock_timeout=inf"),
        ("lock_timeout", "5", TypeError, "lock_timeout is a number of seconds, not str"),
        ("lock_timeout", None, TypeError, "lock_timeout is a number of seconds, not NoneType"),
    ],
)
def test_options_that_make_no_cache(option: str, value: Any, error: type[Exception], says: str) -> None:
    options = {"max_bytes": "1MB", option: value}
    with pytest.raises(error, match=says):
        Cache(new_name(), **options)
    assert files_left() == []


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "/a", "../a", ".", "..", ".hidden", "-a", "_a", "a b", "a\n", "a\0b", "ключ", "a~b", "x" * 101, "*"],
)
def test_names_that_are_none(name: str) -> None:
    for operation in (Cache, Cache.attach, segment.unlink):
        with pytest.raises(ValueError, match="cannot name a cache: use 1 to 100 ASCII letters, digits"):
            operation(name)


@pytest.mark.parametrize("name", [None, 5, b"name", ["name"]], ids=repr)
def test_names_of_a_wrong_type(name: Any) -> None:
    for operation in (Cache, Cache.attach, segment.unlink):
        with pytest.raises(TypeError, match="the name of a cache is a str, not "):
            operation(name)


def test_attaching_to_nothing(name: str) -> None:
    with pytest.raises(CacheNotFound, match=f"there is no cache named {name!r}: `shmcache ls`") as caught:
        Cache.attach(name)
    assert str(caught.value).startswith("there is")
    assert files_left() == []
    assert segment.unlink(name) is False


def test_another_geometry_names_both(cache: Cache) -> None:
    live = cache.stats()
    for option, here, asked in (
        ("max_bytes", live.max_bytes, 2**20),
        ("max_entries", live.max_entries, 51),
        ("shards", live.shards, 2),
    ):
        options: dict[str, Any] = {option: asked}
        with pytest.raises(GeometryMismatch, match=f"has {option}={here}, but {option}={asked} was asked for.*unlink"):
            Cache(cache.name, **options)
        with pytest.raises(GeometryMismatch):
            Cache.attach(cache.name, **options)
    with pytest.raises(GeometryMismatch, match=r"max_bytes=131072, max_entries=50, but max_bytes=4096, max_entries=1 "):
        Cache(cache.name, max_bytes=4096, max_entries=1)
    with Cache(cache.name, max_bytes="128KB", max_entries=50, shards=1, eviction="lru") as same:
        assert same.stats().max_entries == 50


def test_the_error_of_a_small_size_names_enough(name: str) -> None:
    for max_entries in (10, 10_000, 1_000_000):
        for shards in (1, 8):
            with pytest.raises(ValueError, match="too small for max_entries") as caught:
                Cache(name, max_bytes="20kB", max_entries=max_entries, shards=shards)
            least = int(str(caught.value).split("at least ")[1].split(" ")[0].replace(",", ""))
            assert layout.Geometry.plan(least, max_entries, shards).max_entries == max_entries


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Another Python that runs this code and is no child by fork."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=Path(shmcache.__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ATTACH = """
import sys, shmcache
try:
    cache = shmcache.Cache(sys.argv[1], **eval(sys.argv[2]))
except shmcache.ShmcacheError as error:
    print(type(error).__name__, error, flush=True)
else:
    cache.set("from", "the other")
    print("attached", flush=True)
sys.stdin.readline()
"""


def test_a_refused_process_keeps_no_place(cache: Cache) -> None:
    with python(ATTACH, cache.name, "{'max_entries': 51}") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("GeometryMismatch a live cache")
        assert cache.stats().processes == 1
        assert process.communicate("\n", 60) == ("", "")


# --- files that are no cache ----------------------------------------------------------------------------------------
def segment_path(name: str) -> Path:
    return Path(segment.DIRECTORY) / segment.file_name(name)


@pytest.fixture
def closed(name: str) -> Iterator[str]:
    """The name of a cache that nobody has attached. A test that damages a word puts it back, and the entry is there."""
    with Cache(name, max_bytes="1MB", max_entries=100) as cache:
        cache.set("old", "value")
    yield name
    with contextlib.suppress(CacheNotFound), Cache.attach(name) as cache:
        assert cache.get("old") == "value"


@contextlib.contextmanager
def word_changed(name: str, word: int, value: int | Callable[[int], int]) -> Iterator[None]:
    """One word of the header is another one for a while."""
    fd = os.open(segment_path(name), os.O_RDWR)
    try:
        before = os.pread(fd, 8, word * 8)
        number = value(int.from_bytes(before, sys.byteorder)) if callable(value) else value
        os.pwrite(fd, number.to_bytes(8, sys.byteorder), word * 8)
        yield
        os.pwrite(fd, before, word * 8)
    finally:
        os.close(fd)


def refuses(name: str, error: type[Exception], says: str) -> None:
    """Neither way of attaching succeeds, and the message helps."""
    for attach in (Cache, Cache.attach):
        with pytest.raises(error, match=says):
            attach(name)


def test_a_file_that_is_not_a_cache(name: str) -> None:
    for contents in (b"some text", b"x" * 100_000, bytes(8) + b"x" * 10_000, b"\x7fELF" + bytes(4096)):
        Path(segment.lock_path(name)).touch(0o600)
        segment_path(name).write_bytes(contents)
        segment_path(name).chmod(0o600)
        refuses(name, IncompatibleSegment, "is not a cache.*(unlink|another name|other name)")
        assert segment_path(name).read_bytes() == contents
        segment.unlink(name)
    assert files_left() == []


def test_another_layout_version(closed: str) -> None:
    for version in (0, layout.LAYOUT_VERSION + 1, 2**63):
        with word_changed(closed, layout.H_VERSION, version):
            refuses(closed, IncompatibleSegment, f"layout version {version}, this is a build for version 1.*unlink")


def test_the_other_byte_order(closed: str) -> None:
    swapped = int.from_bytes(layout.MAGIC.to_bytes(8, "little"), "big")
    with word_changed(closed, layout.H_MAGIC, swapped):
        refuses(closed, IncompatibleSegment, "the other byte order")


@pytest.mark.parametrize("name_of_word", ["BYTES", "ENTRIES", "SHARDS", "SLOTS", "BLOCKS", "PROCESSES", "EVICTION"])
def test_a_header_that_contradicts_itself(closed: str, name_of_word: str) -> None:
    word = getattr(layout, f"H_{name_of_word}")
    step = 8192 if name_of_word == "BYTES" else 1
    changes: list[int | Callable[[int], int]] = [2**64 - 1, 2**32, lambda before: before + step]
    if name_of_word != "EVICTION":
        changes += [0, lambda before: before - step]
    for change in changes:
        with word_changed(closed, word, change):
            refuses(closed, CorruptSegment, "does not describe.*(truncated|overwritten).*unlink")


@pytest.mark.parametrize("size", [4096, 8192, 500_000, 2**20 - 4096, 2**20 - 1])
def test_a_truncated_segment(name: str, size: int) -> None:
    Cache(name, max_bytes="1MB").close()
    os.truncate(segment_path(name), size)
    refuses(name, CorruptSegment, "truncated or overwritten; remove it with `shmcache unlink")
    assert segment_path(name).stat().st_size == size
    segment.unlink(name)


def test_a_segment_shorter_than_its_header(name: str) -> None:
    Cache(name, max_bytes="1MB").close()
    os.truncate(segment_path(name), 300)
    refuses(name, IncompatibleSegment, "has 300 bytes and is not a cache")
    segment.unlink(name)


@pytest.mark.parametrize("stage", ["empty file", "no header", "begun header", "header without its mark"])
def test_a_half_created_segment_is_finished_by_the_next_creator(name: str, stage: str) -> None:
    Cache(name, max_bytes="1MB").close()
    if stage == "empty file":
        os.truncate(segment_path(name), 0)
    elif stage == "no header":
        os.truncate(segment_path(name), 0)
        os.truncate(segment_path(name), 2**20)
    else:
        with segment_path(name).open("r+b") as file:
            file.write(bytes(8))
            if stage == "begun header":
                file.seek(8 * layout.H_SECRET)
                file.write(bytes(8 * (layout.HEADER_WORDS - layout.H_SECRET)))
    with pytest.raises(CorruptSegment, match=r"creation.*never finished: `Cache\(.*\)` makes it anew.*unlink"):
        Cache.attach(name)
    with Cache(name, max_bytes="2MB") as cache:
        cache.set("k", 1)
        assert cache["k"] == 1
        assert cache.max_bytes == 2 * 2**20


# --- compiled and not -----------------------------------------------------------------------------------------------
@pytest.fixture
def other_mode() -> dict[str, str]:
    """What the environment of a process of the other mode needs."""
    environment = {"SHMCACHE_PURE": "1" if is_compiled() else "0", "PYTHONWARNINGS": "ignore"}
    with python("import shmcache; print(shmcache.is_compiled())", **environment) as process:
        answer, errors = process.communicate(timeout=60)
    assert errors == ""
    if answer.strip() == str(is_compiled()):
        pytest.skip("there is no compiled engine here to compare with")
    return environment


def test_a_process_of_the_other_mode_is_refused(cache: Cache, other_mode: dict[str, str]) -> None:
    kinds = ("uncompiled", "compiled")
    here, there = kinds[is_compiled()], kinds[not is_compiled()]
    with python(ATTACH, cache.name, "{}", **other_mode) as process:
        answer, errors = process.communicate("\n", 60)
    assert errors == ""
    assert answer.startswith("IncompatibleSegment")
    assert f"used by {here} processes and this one is {there}" in answer
    assert "SHMCACHE_PURE" in answer
    assert cache.stats().processes == 1


def test_a_cache_of_the_other_mode_is_refused(name: str, other_mode: dict[str, str]) -> None:
    kinds = ("uncompiled", "compiled")
    here, there = kinds[is_compiled()], kinds[not is_compiled()]
    with python(ATTACH, name, "{'max_bytes': '1MB'}", **other_mode) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        refuses(name, IncompatibleSegment, f"used by {there} processes and this one is {here}.*SHMCACHE_PURE")
        assert process.communicate("\n", 60) == ("", "")
    assert segment.unlink(name) is True


# --- after close ----------------------------------------------------------------------------------------------------
def test_use_after_close(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB")
    cache.set("old", 1)
    batch = cache.batch()
    memoized = cache.memoize()(len)
    walk = iter(cache.items())
    with Cache.attach(cache.name) as twin:
        cache.close()
        operations: list[Callable[[], Any]] = [
            *with_key(cache, "old"),
            *with_value(cache, 1),
            lambda: cache.set_many({}),
            lambda: cache.delete_many([]),
            lambda: len(cache),
            lambda: list(cache),
            lambda: list(cache.keys()),
            lambda: list(cache.items()),
            lambda: list(cache.values()),
            lambda: next(walk),
            cache.clear,
            cache.purge,
            cache.stats,
            cache.check,
            cache.repair,
            cache.batch,
            lambda: memoized("abc"),
            lambda: memoized.cache_info(),
            lambda: pickle.dumps(cache),
            lambda: cache.max_bytes,
            lambda: cache.max_entries,
            lambda: cache.__enter__(),
        ]
        for operation in operations:
            with pytest.raises(CacheClosed, match="closed: make a new Cache object of the same name"):
                operation()
        with pytest.raises(CacheClosed), batch:
            batch.set("new", 1)
        cache.close()
        assert dict(twin.items()) == {"old": 1}
        assert twin.check() == []


# --- not enough of something ----------------------------------------------------------------------------------------
def test_more_than_there_is_in_shared_memory(name: str) -> None:
    room = os.statvfs(segment.DIRECTORY)
    total = room.f_blocks * room.f_frsize
    if not total:
        pytest.skip("the shared memory of this machine has no limit")
    # Far more than there is: the kernel refuses that at once. Anything less it would first hand out, page by page.
    for size in (total * 2, total * 16, 2**62, 2**63, 2**70):
        with pytest.raises((SegmentTooLarge, ValueError), match=f"{size:,}|{size}") as caught:
            Cache(name, max_bytes=size, max_entries=1000, shards=64 if size > 2**60 else None)
        if size < 2**50:
            assert type(caught.value) is SegmentTooLarge
            message = str(caught.value)
            assert f"of {total:,}" in message
            free = int(re.findall(r"has ([\d,]+) free", message)[0].replace(",", ""))  # others come and go
            assert f"--shm-size={-(-(total - free + size) // 2**30)}g" in message
            assert "Kubernetes" in message
            assert "medium: Memory" in message
        assert files_left() == []
        assert name not in segment.names()
    with Cache(name, max_bytes="1MB") as cache:
        cache.set("k", 1)


def test_more_processes_than_places(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB", max_entries=100)
    cache.set("old", "value")
    places = cache._attachment.geometry.processes
    assert places == 64
    release, hold = os.pipe()
    answers, answer = os.pipe()
    children = []
    try:
        for number in range(places):
            pid = os.fork()
            if not pid:
                try:
                    os.close(hold)
                    try:
                        ok = cache.get("old") == "value"
                        line = f"{number} {'fine' if ok else 'wrong'}\n"
                    except TooManyProcesses as error:
                        line = f"{number} {type(error).__name__} {error}\n"
                    os.write(answer, line.encode())
                    os.read(release, 1)
                finally:
                    os._exit(0)
            children.append(pid)
        os.close(answer)
        got = b""
        while got.count(b"\n") < places:
            got += os.read(answers, 65_536)
        lines = got.decode().splitlines()
        refused = [line for line in lines if not line.endswith(" fine")]
        assert len(refused) == 1
        assert "TooManyProcesses all 64 places of the process table are taken" in refused[0]
        assert "16 MB" in refused[0]
        assert cache.stats().processes == places
        with python(ATTACH, cache.name, "{}") as process:
            said, errors = process.communicate("\n", 60)
        assert errors == ""
        assert said.startswith("TooManyProcesses all 64 places")
        assert cache["old"] == "value"
        cache.set("new", 1)
    finally:
        os.close(hold)
        os.close(release)
        os.close(answers)
        for pid in children:
            os.waitpid(pid, 0)
    assert cache.stats().processes == 1
    with python(ATTACH, cache.name, "{}") as process:
        assert process.communicate("\n", 60) == ("attached\n", "")
    assert cache["from"] == "the other"
    assert cache.stats().hits >= places


def test_a_default_cache_has_places_for_a_thousand_processes(make_cache: MakeCache) -> None:
    assert make_cache()._attachment.geometry.processes >= 1024


# --- a stopped process ----------------------------------------------------------------------------------------------
def test_a_lock_held_by_a_stopped_process_is_a_timeout_for_writers_only(make_cache: MakeCache) -> None:
    cache = make_cache(max_bytes="1MB", max_entries=100, lock_timeout=0.1)
    cache.set("old", "value")
    words = cache._attachment.words
    at = cache._attachment.geometry.region(0).header + layout.S_LOCK
    pid = os.fork()
    if not pid:
        try:
            cache.get("old")
            words[at] = cache._attachment.member.owner
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    try:
        assert words[at]
        with pytest.raises(LockTimeout, match=rf"lock_timeout.*live process has it.* {pid}: .*SIGSTOP"):
            cache.set("old", "never")
        assert cache.get("old") == "value"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    cache.set("new", 1)
    assert dict(cache.items()) == {"old": "value", "new": 1}
    assert cache.stats().recoveries == 1


# --- semaphores -------------------------------------------------------------------------------------------------------
def test_semaphores_are_closed_with_the_cache() -> None:
    def mapped() -> int:
        return sum(
            "sem.shmcache" in line or "deleted" in line for line in Path("/proc/self/maps").read_text().splitlines()
        )

    before = mapped()
    for _ in range(20):
        cache = Cache(new_name(), max_bytes="1MB", max_entries=100, shards=4)
        cache.unlink()
        del cache
    gc.collect()
    assert mapped() <= before
