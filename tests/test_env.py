"""`Cache.from_env()`: the four variables, their defaults, and errors that name the variable."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmcache import Cache, CacheNotFound, GeometryMismatch, segment

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


def test_options_win_over_variables(from_env: FromEnv, name: str) -> None:
    variables = {"CACHE_NAME": "of/no-use", "CACHE_MAX_SIZE": "many", "CACHE_TTL": "-1", "CACHE_MAX_MEMORY_MB": "0"}
    cache = from_env(variables, name=name, max_entries=30, default_ttl=None, max_bytes="1MB", serializer="pickle")
    assert (cache.name, cache.max_entries, cache.default_ttl, cache.max_bytes) == (name, 30, None, 2**20)
    cache.set("k", {1: ...})
    assert cache["k"] == {1: ...}


def test_a_live_cache_must_agree_with_the_variables(from_env: FromEnv, name: str) -> None:
    from_env({"CACHE_MAX_SIZE": "500", "CACHE_MAX_MEMORY_MB": "1"}).set("k", 1)
    assert from_env({"CACHE_MAX_SIZE": "500", "CACHE_MAX_MEMORY_MB": "1"})["k"] == 1
    assert from_env({})["k"] == 1
    with pytest.raises(GeometryMismatch, match="max_entries=500, but max_entries=501"):
        from_env({"CACHE_MAX_SIZE": "501", "CACHE_MAX_MEMORY_MB": "1"})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CACHE_MAX_SIZE", "many"),
        ("CACHE_MAX_SIZE", "0"),
        ("CACHE_MAX_SIZE", "-5"),
        ("CACHE_MAX_SIZE", "1.5"),
        ("CACHE_MAX_SIZE", "1e3"),
        ("CACHE_MAX_SIZE", "99999999999"),
        ("CACHE_TTL", "soon"),
        ("CACHE_TTL", "0"),
        ("CACHE_TTL", "-1"),
        ("CACHE_TTL", "nan"),
        ("CACHE_TTL", "inf"),
        ("CACHE_TTL", "1e30"),
        ("CACHE_MAX_MEMORY_MB", "64MB"),
        ("CACHE_MAX_MEMORY_MB", "0"),
        ("CACHE_MAX_MEMORY_MB", "-1"),
        ("CACHE_MAX_MEMORY_MB", "nan"),
        ("CACHE_MAX_MEMORY_MB", "0.0000001"),
        ("CACHE_MAX_MEMORY_MB", "0.001"),
        ("CACHE_MAX_MEMORY_MB", "1e300"),
        ("CACHE_NAME", "a/b"),
        ("CACHE_NAME", "../etc"),
        ("CACHE_NAME", "x" * 101),
        ("CACHE_NAME", "with space"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_variable(
    from_env: FromEnv, name: str, variable: str, text: str
) -> None:
    with pytest.raises(ValueError, match=variable) as caught:
        from_env({variable: text})
    assert text[:20] in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheNotFound):
        Cache.attach(name)
    assert name not in segment.names()


def test_a_bad_name_given_as_an_option_is_not_blamed_on_the_variable(from_env: FromEnv) -> None:
    with pytest.raises(ValueError, match="cannot name a cache") as caught:
        from_env({}, name="a/b")
    assert "CACHE_NAME" not in str(caught.value)


def test_more_entries_than_the_memory_holds_names_a_variable(from_env: FromEnv) -> None:
    with pytest.raises(ValueError, match="CACHE_MAX_"):
        from_env({"CACHE_MAX_SIZE": "1000000", "CACHE_MAX_MEMORY_MB": "1"})
