"""`Cache.from_env()`: the four variables, what holds where they are not set, and errors that name the variable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from shmcache import Cache, CacheNotFound, GeometryMismatch, SegmentTooLarge, segment

FromEnv = Callable[..., Cache]


@pytest.fixture
def from_env(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[FromEnv]:
    """Makes a cache from nothing but the variables given, with a name of the test's own unless it gives one."""
    made: list[Cache] = []

    def make(variables: dict[str, str] | None = None, **options: object) -> Cache:
        for variable in ("CACHE_NAME", "CACHE_MAX_SIZE", "CACHE_TTL", "CACHE_MAX_MEMORY_MB"):
            monkeypatch.delenv(variable, raising=False)
        for variable, text in ({"CACHE_NAME": name} | (variables or {})).items():
            monkeypatch.setenv(variable, text)
        made.append(Cache.from_env(**options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_every_variable(from_env: FromEnv, name: str) -> None:
    cache = from_env({"CACHE_MAX_SIZE": "500", "CACHE_TTL": "2.5", "CACHE_MAX_MEMORY_MB": "2"})
    assert cache.name == name
    assert (cache.max_entries, cache.default_ttl, cache.max_bytes) == (500, 2.5, 2 * 2**20)
    cache.set("k", 1)
    assert cache.ttl("k") == pytest.approx(2.5, abs=1)


def test_defaults_are_those_of_cache(from_env: FromEnv) -> None:
    cache = from_env({})
    assert (cache.max_bytes, cache.default_ttl) == (64 * 2**20, None)


def test_without_a_name_it_is_default(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Recorder(Cache):
        """Says which name it was asked for, and opens nothing."""

        def __init__(self, name: str) -> None:
            opened.append(name)
            self._closed = True

    monkeypatch.delenv("CACHE_NAME", raising=False)
    for variable in ("CACHE_MAX_SIZE", "CACHE_TTL", "CACHE_MAX_MEMORY_MB"):
        monkeypatch.setenv(variable, "")
    Recorder.from_env()
    monkeypatch.setenv("CACHE_NAME", "")
    Recorder.from_env()
    assert opened == ["default", "default"]


def test_blanks_count_for_nothing(from_env: FromEnv) -> None:
    cache = from_env({"CACHE_MAX_SIZE": " 20 ", "CACHE_TTL": " ", "CACHE_MAX_MEMORY_MB": "0.5"})
    assert (cache.max_entries, cache.default_ttl, cache.max_bytes) == (20, None, 2**19)


def test_arguments_hold_where_a_variable_is_not_set(from_env: FromEnv, name: str) -> None:
    unset = {"CACHE_NAME": "", "CACHE_MAX_SIZE": " "}
    cache = from_env(unset, name=name, max_entries=30, default_ttl=9, max_bytes="1MB", serializer="pickle")
    assert (cache.name, cache.max_entries, cache.default_ttl, cache.max_bytes) == (name, 30, 9, 2**20)
    cache.set("k", {1: ...})
    assert cache["k"] == {1: ...}


def test_variables_win_over_arguments(from_env: FromEnv, name: str) -> None:
    variables = {"CACHE_MAX_SIZE": "500", "CACHE_TTL": "2.5", "CACHE_MAX_MEMORY_MB": "2"}
    cache = from_env(variables, name="of/no-use", max_entries=30, default_ttl=None, max_bytes="1MB")
    assert (cache.name, cache.max_entries, cache.default_ttl, cache.max_bytes) == (name, 500, 2.5, 2 * 2**20)


def test_a_live_cache_must_agree_with_the_variables(from_env: FromEnv, name: str) -> None:
    from_env({"CACHE_MAX_SIZE": "500", "CACHE_MAX_MEMORY_MB": "1"}).set("k", 1)
    assert from_env({"CACHE_MAX_SIZE": "500", "CACHE_MAX_MEMORY_MB": "1"})["k"] == 1
    assert from_env({})["k"] == 1
    both = r"^CACHE_MAX_SIZE='501' in the environment: .*max_entries=500, but max_entries=501 was asked for"
    with pytest.raises(GeometryMismatch, match=both) as caught:
        from_env({"CACHE_MAX_SIZE": "501", "CACHE_MAX_MEMORY_MB": "1"})
    assert isinstance(caught.value.__cause__, GeometryMismatch)
    with pytest.raises(GeometryMismatch, match=r"^a live cache .* shards=1, but shards=2 was asked for"):
        from_env({"CACHE_MAX_SIZE": "500"}, shards=2)


def test_more_memory_than_there_is_names_the_variable(from_env: FromEnv) -> None:
    room = os.statvfs(segment.DIRECTORY)
    if not room.f_blocks:
        pytest.skip("the shared memory of this machine has no limit")
    megabytes = str(2 * room.f_blocks * room.f_frsize // 2**20)
    with pytest.raises(SegmentTooLarge, match=rf"^CACHE_MAX_MEMORY_MB='{megabytes}' in the environment: cache .* asks"):
        from_env({"CACHE_MAX_MEMORY_MB": megabytes})
    with pytest.raises(SegmentTooLarge, match=r"^cache .* asks"):
        from_env({"CACHE_TTL": "5"}, max_bytes=f"{megabytes}MB")


@pytest.mark.parametrize(
    ("variable", "texts", "expected"),
    [
        (
            "CACHE_MAX_SIZE",
            ["many", "0", "-5", "1.5", "1e3", "99999999999"],
            "expected a whole number of entries, 1 to 2,147,483,647",
        ),
        (
            "CACHE_TTL",
            ["soon", "none", "0", "-1", "nan", "inf", "1e30", "4611686019"],
            "greater than 0 and at most 4,611,686,018 (146 years); leave it unset for no expiry, or for the default",
        ),
        (
            "CACHE_MAX_MEMORY_MB",
            ["64MB", "0", "-1", "-3", "nan", "inf", "1e300", "8796093022208"],
            "expected a number of MB (1,048,576 bytes) greater than 0 and less than 8,796,093,022,208, such as 64",
        ),
        ("CACHE_MAX_MEMORY_MB", ["0.0000001", "0.001"], "is too small for max_entries="),
        ("CACHE_NAME", ["a/b", "../etc", "x" * 101, "with space"], "use 1 to 100 ASCII letters, digits, '.', '_' or"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_variable(
    from_env: FromEnv, name: str, variable: str, texts: list[str], expected: str
) -> None:
    for text in texts:
        with pytest.raises(ValueError, match=variable) as caught:
            from_env({variable: text})
        message = str(caught.value)
        assert message.startswith(f"{variable}={text!r} in the environment: ")
        assert expected in message
        assert "\n" not in message
        assert "memory=" not in message
        assert "seconds=" not in message
    with pytest.raises(CacheNotFound):
        Cache.attach(name)
    assert name not in segment.names()


def test_a_bad_argument_is_not_blamed_on_a_variable(from_env: FromEnv) -> None:
    for options in ({"name": "a/b"}, {"max_entries": 0}, {"default_ttl": -1}, {"max_bytes": "huge"}):
        with pytest.raises(ValueError, match=r"cannot name a cache|expected|is no size") as caught:
            from_env({"CACHE_NAME": ""}, **options)
        assert "CACHE_" not in str(caught.value)


def test_more_entries_than_the_memory_holds_names_the_variables(from_env: FromEnv) -> None:
    with pytest.raises(ValueError, match=r"^CACHE_MAX_SIZE='1000000' and CACHE_MAX_MEMORY_MB='1' in the .* too small"):
        from_env({"CACHE_MAX_SIZE": "1000000", "CACHE_MAX_MEMORY_MB": "1"})
    with pytest.raises(ValueError, match=r"^CACHE_MAX_SIZE='1000000' in the environment: max_bytes=.* too small"):
        from_env({"CACHE_MAX_SIZE": "1000000"}, max_bytes="1MB")
