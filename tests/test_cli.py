"""The `shmcache` command, always as a process of its own, as a shell runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest

from shmcache import Cache, CacheNotFound, __version__, is_compiled, segment
from shmcache.cli.report import identify, lock_holders, stats_lines
from shmcache.cli.text import show_age, show_size
from shmcache.engine import layout

COMMAND = [sys.executable, "-W", "error", "-m", "shmcache"]
ON_A_CACHE = {  # every command that works on a cache, with arguments that do
    "stats": [],
    "keys": [],
    "info": ["key"],
    "check": [],
    "doctor": [],
    "repair": [],
    "get": ["key"],
    "set": ["key", "value"],
    "delete": ["key"],
    "clear": [],
    "unlink": [],
}

Make = Callable[..., Cache]


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env=os.environ | environment, timeout=60
    )


def own_command() -> str:
    """The command line of this process, which a test runner may have put something else in the place of."""
    return " ".join(psutil.Process().cmdline())


def output(*arguments: str, stdin: bytes = b"") -> str:
    """What the command prints when all is well."""
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def from_json(*arguments: str) -> Any:
    return json.loads(output(*arguments, "--json"))


def failure(*arguments: str, status: int = 1) -> str:
    """The one line on stderr when it is not."""
    done = run(*arguments)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == status, lines
    assert lines[-1].startswith("Error: ")
    assert len(lines) == 1 or status == 2
    return lines[-1]


@pytest.fixture
def cache(make_cache: Make) -> Cache:
    return make_cache(max_bytes="2MB", max_entries=1000, default_ttl=300)


# --- looking --------------------------------------------------------------------------------------------------------
def test_ls_has_every_cache_and_counts_attached_processes_but_not_itself(cache: Cache) -> None:
    cache["key"] = "value"
    assert cache["key"] == "value"
    assert "other" not in cache
    listed = {each["name"]: each for each in from_json("ls")}
    assert listed[cache.name] == {
        "name": cache.name,
        "max_bytes": 2 * 2**20,
        "bytes_used": 9,
        "entries": 1,
        "max_entries": 1000,
        "hits": 1,
        "misses": 1,
        "hit_ratio": 0.5,
        "processes": 1,
    }
    done = run("ls")
    header, *rows = done.stdout.decode().splitlines()
    row = next(row for row in rows if row.startswith(cache.name + " "))
    assert done.returncode == 0
    assert re.split(r"\s{2,}", header) == ["NAME", "SIZE", "USED", "ENTRIES", "HIT RATIO", "PROCESSES"]
    assert re.split(r"\s{2,}", row)[1:] == ["2.0 MiB", "9 B", "1", "50.0 %", "1"]
    assert len(header) == len(row)


def test_ls_counts_nobody_where_nobody_is(name: str) -> None:
    Cache(name, max_bytes="1MB").close()
    listed = next(each for each in from_json("ls") if each["name"] == name)
    assert (listed["processes"], listed["hit_ratio"]) == (0, None)


def test_ls_says_what_it_cannot_open(name: str) -> None:
    Cache(name, max_bytes="1MB").close()
    (Path(segment.DIRECTORY) / segment.file_name(name)).write_bytes(b"no cache" * 1000)
    done = run("ls")
    assert done.returncode == 0
    assert re.search(rf"^{name}( +-){{5}}$", done.stdout.decode(), re.MULTILINE)
    assert f"{name}: " in done.stderr.decode()
    assert "not a cache" in next(each for each in from_json("ls") if each["name"] == name)["error"]
    assert "not a cache" in failure("stats", name)
    assert output("unlink", name) == ""


def test_stats(cache: Cache) -> None:
    cache.set_many(dict.fromkeys(range(3), "value"))
    for number in range(5):
        cache.get(number)
    cache.delete(0)
    began = time.time()
    stats = from_json("stats", cache.name)
    counts = {"hits": 3, "misses": 2, "sets": 3, "deletes": 1, "entries": 2, "peak_entries": 3, "processes": 1}
    assert {field: stats[field] for field in counts} == counts
    assert stats["compiled"] is is_compiled()
    assert 3 / (time.time() - stats["created"]) <= stats["rates"]["hits"] <= 3 / (began - stats["created"])
    (process,) = stats["attached"]
    counts = {"pid": os.getpid(), "hits": 3, "misses": 2, "sets": 3, "deletes": 1}
    assert {field: process[field] for field in counts} == counts
    assert process["command"] == own_command()
    assert process["note"] is None

    shown = output("stats", cache.name)
    assert re.search(r"^ +TOTAL  AVERAGE PER SECOND$", shown, re.MULTILINE)
    assert re.search(r"^hits +3 +[\d.]+$", shown, re.MULTILINE)
    assert re.search(r"^hit ratio +60.0 %$", shown, re.MULTILINE)
    assert re.search(r"^entries +2 of at most 1,000 \(peak 3\)$", shown, re.MULTILINE)
    for word in ("misses", "sets", "deletes", "evictions", "expirations", "memory", "lock waits", "recoveries"):
        assert f"\n{word} " in shown
    assert re.search(rf"^ *{os.getpid()} .* 3 +2 +3 +1  {re.escape(own_command().split()[0])}", shown, re.MULTILINE)


def test_processes_are_in_the_order_of_pids_and_cut_at_the_width_of_the_terminal(cache: Cache) -> None:
    before = cache.stats()
    (me,) = before.attached
    stats = replace(before, attached=[replace(me, pid=1), me])
    full = list(stats_lines(stats))[-2:]
    assert max(map(len, full)) > 60
    assert list(stats_lines(stats, 60))[-2:] == [line[:60] for line in full]
    with subprocess.Popen(
        [sys.executable, "-c", f"import shmcache; c = shmcache.Cache({cache.name!r}); c.get(1); print(1); input()"],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert [each.pid for each in cache.stats().attached] == sorted([os.getpid(), other.pid])
        other.communicate(b"\n")


@pytest.fixture
def watch(cache: Cache) -> Iterator[subprocess.Popen[str]]:
    watching = subprocess.Popen(
        [*COMMAND, "stats", cache.name, "--watch", "0.1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watching:
        try:
            yield watching
        finally:
            watching.kill()


def test_watch_shows_live_rates_until_interrupted(cache: Cache, watch: subprocess.Popen[str]) -> None:
    assert watch.stdout is not None
    assert watch.stderr is not None
    cache["key"] = "value"
    assert json.loads(watch.stdout.readline())["processes"] == 1  # it has begun
    while True:
        assert cache["key"] == "value"
        if json.loads(watch.stdout.readline())["rates"]["hits"] > 0:
            break
    watch.send_signal(signal.SIGINT)
    assert watch.wait(10) == 130
    assert watch.stderr.read() == ""


def test_watch_ends_with_its_cache(cache: Cache, watch: subprocess.Popen[str]) -> None:
    assert watch.stdout is not None
    assert watch.stderr is not None
    watch.stdout.readline()
    cache.unlink()
    assert watch.wait(10) == 1
    assert watch.stderr.read().splitlines()[-1].startswith(f"Error: there is no cache named {cache.name!r}")


def test_watch_is_a_table_for_people(cache: Cache) -> None:
    watching = subprocess.Popen([*COMMAND, "stats", cache.name, "--watch", "0.05"], stdout=subprocess.PIPE, text=True)
    with watching:
        assert watching.stdout is not None
        header, row = watching.stdout.readline(), watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
    assert header.split()[:3] == ["time", "hits/s", "misses/s"]
    assert len(header) == len(row)


def test_a_process_is_who_its_pid_says_only_if_it_can_be(cache: Cache) -> None:
    (me,) = cache.stats().attached
    holders = lock_holders(cache.name)
    assert holders is None or os.getpid() in holders
    assert identify(me, holders).command == own_command()
    assert "another process" in str(identify(replace(me, attached=me.attached - 1e6), holders))
    assert "another process" in str(identify(me, set()))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert "ended" in str(identify(replace(me, pid=ended.pid), holders))


def test_keys(cache: Cache) -> None:
    cache.set_many(dict.fromkeys(("user:1", "user:2", "page", "two\nlines", 7, b"user:", ("user", 1.5)), 1))
    expected = {"user:1", "user:2", "page", r"'two\nlines'", "7", "b'user:'", "('user', 1.5)"}
    assert set(output("keys", cache.name).splitlines()) == expected
    assert set(output("keys", cache.name, "--prefix", "user:").splitlines()) == {"user:1", "user:2"}
    lines = [json.loads(line) for line in output("keys", cache.name, "--json").splitlines()]
    assert sorted(lines, key=repr) == sorted(
        ["user:1", "user:2", "page", "two\nlines", 7, {"base64": "dXNlcjo="}, ["user", 1.5]], key=repr
    )


def test_a_broken_pipe_is_silent(make_cache: Make) -> None:
    cache = make_cache(max_bytes="4MB", max_entries=20_000)
    cache.set_many({f"{number:0100}": None for number in range(5000)})  # more than a pipe holds
    with subprocess.Popen(
        [*COMMAND, "keys", cache.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as keys:
        assert keys.stdout is not None
        assert keys.stderr is not None
        assert keys.stdout.readline()
        keys.stdout.close()
        assert keys.stderr.read() == ""
    assert keys.returncode == 141


def test_info_does_not_count_a_read(cache: Cache) -> None:
    cache["key"] = "value"
    cache.set(("forever", 1), "value", ttl=None)
    described = from_json("info", cache.name, "key")
    assert described["key"] == "key"
    assert 0 < described["ttl"] <= 300
    assert described["version"] == cache.info("key").version
    assert (described["key_bytes"], described["value_bytes"]) == (3, 6)
    assert re.search(r"^expires +never$", output("info", cache.name, '["forever", 1]', "--key-type", "json"), re.M)
    assert cache.stats().hits == 0


def test_check_exits_with_1_if_there_are_problems(cache: Cache) -> None:
    cache["key"] = "value"
    assert output("check", cache.name) == f"{cache.name}: no contradictions\n"
    assert from_json("check", cache.name) == {"name": cache.name, "problems": []}
    word = cache._attachment.geometry.region(0).header + layout.S_ENTRIES
    cache._attachment.words[word] += 1
    done = run("check", cache.name)
    assert done.returncode == 1
    assert done.stdout.startswith(b"shard 0: ")
    assert done.stderr == b""
    done = run("check", cache.name, "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["problems"]) >= 1
    cache._attachment.words[word] -= 1


# --- reading and writing --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "argument", "key"),
    [
        ("str", "17", "17"),
        ("int", "17", 17),
        ("bytes", "é", "é".encode()),
        ("json", '["user", 1, 2.5, null, [true]]', ("user", 1, 2.5, None, (True,))),
        ("json", "1e0", 1.0),
        ("python", "('user', b'\\xff')", ("user", b"\xff")),
    ],
)
def test_types_of_keys(cache: Cache, kind: str, argument: str, key: Any) -> None:
    assert output("set", cache.name, argument, "value", "--key-type", kind) == ""
    assert [*map(repr, cache)] == [repr(key)]
    assert output("get", cache.name, argument, "--key-type", kind) == "value\n"
    assert output("delete", cache.name, argument, "--key-type", kind) == "1 deleted\n"


@pytest.mark.parametrize(
    ("kind", "argument", "value", "shown"),
    [
        ("str", "17", "17", "17"),
        ("int", "17", 17, "17"),
        ("bytes", "é", "é".encode(), r"b'\xc3\xa9'"),
        ("json", '{"a": [1, null]}', {"a": [1, None]}, "{'a': [1, None]}"),
        ("python", "{'a': (1, {2})}", {"a": (1, {2})}, "{'a': (1, {2})}"),
    ],
)
def test_types_of_values(cache: Cache, kind: str, argument: str, value: Any, shown: str) -> None:
    assert output("set", cache.name, "key", argument, "--value-type", kind) == ""
    assert cache["key"] == value
    assert type(cache["key"]) is type(value)
    assert output("get", cache.name, "key") == shown + "\n"


def test_json_of_any_value(cache: Cache) -> None:
    numpy = pytest.importorskip("numpy")
    cache["key"] = {
        "tuple": (1, (2, "é")),
        "set": {3},
        "bytes": b"\x00\xff",
        "moment": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
        "day": date(2030, 1, 2),
        "span": timedelta(minutes=1.5),
        "decimal": Decimal("1.50"),
        "uuid": UUID(int=1),
        "big": 2**80,
        "infinite": [float("inf"), float("-inf"), float("nan")],
        "array": numpy.arange(3),
        "number": numpy.int64(4),
        "complex": 1j,
        5: None,
        None: True,
        ("a", 1): 0,
    }
    assert from_json("get", cache.name, "key") == {
        "tuple": [1, [2, "é"]],
        "set": [3],
        "bytes": {"base64": "AP8="},
        "moment": "2030-01-02T03:04:05+00:00",
        "day": "2030-01-02",
        "span": 90.0,
        "decimal": "1.50",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "big": 2**80,
        "infinite": ["inf", "-inf", "nan"],
        "array": [0, 1, 2],
        "number": 4,
        "complex": "1j",
        "5": None,
        "null": True,
        "('a', 1)": 0,
    }


def test_raw_values_and_standard_input(cache: Cache) -> None:
    data = bytes(range(256))
    assert output("set", cache.name, "bytes", "-", "--value-type", "bytes", stdin=data) == ""
    assert run("get", cache.name, "bytes", "--raw").stdout == data
    assert output("set", cache.name, "text", "-", stdin="é\n".encode()) == ""
    assert run("get", cache.name, "text", "--raw").stdout == "é\n".encode()
    assert run("set", cache.name, "text", "-", stdin=data).returncode == 1
    cache["list"] = [1]
    assert "list" in failure("get", cache.name, "list", "--raw")
    failure("get", cache.name, "text", "--raw", "--json", status=2)


def test_time_to_live(cache: Cache) -> None:
    for ttl, expected in (((), 300), (("--ttl", "1000.5"), 1000.5), (("--ttl", "none"), None)):
        output("set", cache.name, "key", "value", *ttl)
        assert cache.ttl("key") == (expected if expected is None else pytest.approx(expected, abs=30))


def test_delete(cache: Cache) -> None:
    cache.set_many(dict.fromkeys("abcd"))
    assert output("delete", cache.name, "a", "b") == "2 deleted\n"
    done = run("delete", cache.name, "x", "c", "y")
    assert (done.returncode, done.stdout) == (1, b"1 deleted\n")
    assert done.stderr.decode() == f"Error: cache {cache.name!r} has no key 'x', 'y'\n"
    done = run("delete", cache.name, "x", "d", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"deleted": 1, "missing": ["x"]})
    assert len(cache) == 0


def test_what_a_locale_lacks_is_escaped(cache: Cache) -> None:
    cache["key"] = "é€"
    done = run("get", cache.name, "key", PYTHONIOENCODING="latin-1")
    assert (done.stdout, done.stderr) == (b"\xe9\\u20ac\n", b"")


# --- the whole cache ------------------------------------------------------------------------------------------------
def test_clear_and_unlink(cache: Cache) -> None:
    cache["key"] = "value"
    assert output("clear", cache.name) == ""
    assert len(cache) == 0
    assert output("unlink", cache.name) == ""
    with pytest.raises(CacheNotFound):
        Cache.attach(cache.name)
    failure("unlink", cache.name)


def test_no_command_changes_the_geometry(cache: Cache) -> None:
    before = cache._attachment.geometry
    for command, arguments in ON_A_CACHE.items():
        if command != "unlink":
            run(command, cache.name, *arguments)
    assert Cache.attach(cache.name)._attachment.geometry == before
    assert cache.default_ttl == 300


# --- failures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ON_A_CACHE)
def test_a_missing_cache_is_one_line(command: str, name: str) -> None:
    assert f"no cache named {name!r}" in failure(command, name, *ON_A_CACHE[command])


@pytest.mark.parametrize("command", ["get", "info", "delete"])
def test_a_missing_key_is_one_line(command: str, cache: Cache) -> None:
    assert failure(command, cache.name, "nope") == f"Error: cache {cache.name!r} has no key 'nope'"
    for key, other in (
        ("5", "for the int use --key-type int"),
        ("('user', 5)", "for the tuple use --key-type python"),
        ('["user", 5]', "for the tuple use --key-type json"),
        ("2.5", "for the float use --key-type python"),
        ("b'x'", "for the bytes use --key-type python"),
    ):
        said = failure(command, cache.name, key)
        assert said == f"Error: cache {cache.name!r} has no key {key!r} (looked for the str {key!r}; {other})"
    for key in ("{'a': 1}", "user:5", "(", "[[[1, {}]]]"):
        assert failure(command, cache.name, key) == f"Error: cache {cache.name!r} has no key {key!r}"
    assert failure(command, cache.name, "5", "--key-type", "int") == f"Error: cache {cache.name!r} has no key 5"


def test_a_value_that_does_not_fit_is_one_line(make_cache: Make) -> None:
    cache = make_cache(max_bytes="128KB")
    cache["key"] = "old"
    assert "holds" in failure("set", cache.name, "key", "x" * 130_000)
    assert cache["key"] == "old"


@pytest.mark.skipif(not is_compiled(), reason="needs both builds")
def test_a_cache_of_the_other_build_is_one_line(cache: Cache) -> None:
    done = run("get", cache.name, "key", SHMCACHE_PURE="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert b"compiled" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["get", "name"],
        ["get", "a/b", "key"],
        ["get", "name", "x", "--key-type", "int"],
        ["get", "name", "[NaN]", "--key-type", "json"],
        ["get", "name", "print()", "--key-type", "python"],
        ["get", "name", '{"a": 1}', "--key-type", "json"],
        ["info", "name", "[1]", "--key-type", "python"],
        ["set", "name", '"\\ud800"', "value", "--key-type", "json"],
        ["set", "name", os.fsdecode(b"\xff"), "value"],
        ["set", "name", "key", os.fsdecode(b"\xff")],
        ["delete", "name", "key", os.fsdecode(b"\xff")],
        ["set", "name", "key", "value", "--ttl", "5e9"],
        ["set", "name", "key", "{", "--value-type", "json"],
        ["set", "name", "key", "value", "--ttl", "0"],
        ["set", "name", "key", "value", "--ttl", "inf"],
        ["set", "name", "key", "value", "--ttl", "soon"],
        ["stats", "name", "--watch", "0"],
        ["demo", "--workers", "1"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    said = failure(*arguments, status=2)
    assert " object at " not in said


def test_wrong_usage_says_what_was_expected() -> None:
    assert "at most 4,611,686,018 (146 years)" in failure("set", "name", "key", "value", "--ttl", "5e9", status=2)
    assert failure("get", "name", "f(x)", "--key-type", "python", status=2).endswith(
        "'f(x)' is not a Python literal: a literal has str, bytes, numbers, tuples, lists, dicts, sets, True, False "
        "and None only"
    )
    assert "dict is not a key type" in failure("get", "name", "{}", "--key-type", "json", status=2)
    assert "begins with a dash goes behind `--`." in failure("set", "name", "key", "-5", status=2)


# --- about itself ---------------------------------------------------------------------------------------------------
def test_version_says_which_engine_runs() -> None:
    said = output("--version")
    assert __version__ in said
    assert ("uncompiled" not in said) is is_compiled()


@pytest.mark.parametrize("command", ["ls", "demo", *ON_A_CACHE])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: shmcache {command}" in output(command, "--help")
    assert re.search(rf"^  {command} +\w[^.]+\.$", output("--help"), re.MULTILINE)
    assert output(command, "-h") == output(command, "--help")


def test_keys_that_begin_with_a_dash_go_behind_two(cache: Cache) -> None:
    assert output("-h") == output("--help")
    for command in ("info", "get", "set", "delete"):
        assert "behind `--`" in " ".join(output(command, "-h").split())
    output("set", cache.name, "--", "-key", "-value")
    assert output("get", cache.name, "--", "-key") == "-value\n"
    assert output("delete", cache.name, "--", "-key") == "1 deleted\n"


def test_the_installed_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("shmcache")
    if not script.exists():
        pytest.skip("shmcache is not installed beside this Python")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout == output("--version")


def test_figures_for_people() -> None:
    sizes = (0, 1023, 1024, 64 * 2**20, 2**30 - 1, 3 * 2**40)
    assert [show_size(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "64.0 MiB", "1.0 GiB", "3.0 TiB"]
    spans = (0.25, 59, 60, 3600 + 12 * 60 + 5, 86_400, 90_061)
    assert [show_age(span) for span in spans] == ["0.25 s", "59 s", "1 min", "1 h 12 min", "1 d", "1 d 1 h"]
