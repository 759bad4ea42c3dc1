"""The commands of `shmcache`: what each takes, and what it prints."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from shmcache import segment
from shmcache.cache import Cache
from shmcache.cli import Commands, text
from shmcache.engine.store import DEFAULT, MAX_TTL_NS, is_compiled, ttl_to_ns
from shmcache.errors import CacheNotFound, ShmcacheError
from shmcache.version import __version__

__all__ = ["shmcache"]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


# --- what commands have in common -----------------------------------------------------------------------------------
class CacheName(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A name that a cache can have; the shell completes those there are."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            segment.check_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in segment.names() if name.startswith(incomplete)]


class TimeToLive(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """Seconds, or "none" for no expiry."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is DEFAULT:
            return DEFAULT
        if value == "none":
            return None
        try:
            seconds = float(value)
            ttl_to_ns(seconds)
        except ValueError:
            self.fail(
                f"{value!r} is no number of seconds greater than 0 and at most {MAX_TTL_NS // 10**9:,} (146 years), "
                f"nor 'none' for no expiry",
                param,
                ctx,
            )
        return seconds


cache_name: Decorator = click.argument("name", type=CacheName())
as_json: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
key_type: Decorator = click.option(
    "--key-type",
    type=click.Choice(text.TYPES),
    default="str",
    show_default=True,
    help="What KEY is: text, an int, the bytes as typed, JSON (an array is a tuple), or a Python literal.",
)


def parse(argument: str, kind: str, name: str) -> Any:
    """The key or value of an argument; what it cannot be is a usage error."""
    try:
        return text.parse(argument, kind, is_key=name == "KEY")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{name}'") from None


def fail_no_key(name: str, *keys: object) -> NoReturn:
    """Say which keys are missing, and of what type a str may have been meant."""
    hint = ""
    for key in keys:
        other = text.hint_at_type(key) if isinstance(key, str) else None
        if other:
            hint = f" (looked for the str {key!r}; {other})"
            break
    raise click.ClickException(f"cache {name!r} has no key {', '.join(map(repr, keys))}{hint}")


def show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        engine = "compiled" if is_compiled() else "uncompiled, many times slower"
        click.echo(f"shmcache {__version__}, the engine runs {engine}")
        ctx.exit()


# --- the group ------------------------------------------------------------------------------------------------------
@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version, and whether the compiled engine runs.",
)
def shmcache() -> None:
    """Look into the shared-memory caches of this user, and change them, while their processes run.

    Keys and values are text unless --key-type or --value-type says otherwise: `--key-type python "('user', 17)"` is a
    tuple. Text that begins with a dash goes behind `--`. No command asks for confirmation, creates a cache or changes
    its geometry.

    JSON has fewer types than a cache. With --json, tuples and sets are arrays; dates and times are ISO 8601 strings,
    timedeltas seconds; bytes are {"base64": "..."}; infinity and NaN are the strings inf, -inf and nan; a key of a
    dict that is no str is written as JSON, or else as Python, would; anything else is its str().

    The exit status is 0, or 1 for an error, a missing key or a problem found, or 2 for wrong usage.
    """


# --- looking --------------------------------------------------------------------------------------------------------
@shmcache.command()
@as_json
def ls(as_json: bool) -> None:
    """List every cache of this user. A line each: its size, what of it keys and values use, its entries, the share of
    reads that were hits, and the processes attached now (this command is not counted). With --json, an array of
    objects.

    \b
    Example: shmcache ls
    """
    from shmcache.cli import report

    found: list[tuple[str, Any]] = []
    for name in segment.names():
        try:
            with Cache.attach(name, lock_timeout=1) as cache:
                found.append((name, report.without_self(cache.stats())))
        except CacheNotFound:
            pass  # it was unlinked since
        except (ShmcacheError, OSError) as error:
            found.append((name, str(error)))
    if as_json:
        click.echo(text.as_json([report.list_json(name, stats) for name, stats in found]))
        return
    for line in report.list_lines(found):
        click.echo(line)
    for name, stats in found:
        if isinstance(stats, str):
            click.echo(f"{name}: {stats}", err=True)
    if not found:
        click.echo("this user has no caches on this machine", err=True)


@shmcache.command()
@cache_name
@click.option(
    "--watch",
    type=click.FloatRange(min=0.05),
    metavar="SECONDS",
    help="Print a line of live rates this often, until Ctrl-C.",
)
@as_json
def stats(name: str, watch: float | None, as_json: bool) -> None:
    """Show the figures of a cache. They are totals since it was created, and their average per second since then
    (--watch shows what it is now); entries and memory, now and at their peak; waits for locks; locks taken over from
    dead processes (recoveries); and each attached process with its own counts, in the order of pids. Command lines are
    cut at the width of a terminal; --json has them whole.

    A process of another pid namespace, such as a container, counts, but has no command line here.

    \b
    Example: shmcache stats web --watch 1
    """
    from shmcache.cli import report

    with Cache.attach(name) as cache:
        if watch is not None:
            watch_rates(cache, watch, as_json)
        now = report.without_self(cache.stats())
    if as_json:
        click.echo(text.as_json(report.stats_json(now)))
        return
    for line in report.stats_lines(now, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        click.echo(line)


def watch_rates(cache: Cache, seconds: float, as_json: bool) -> NoReturn:
    """Print the rates of each `seconds`, with a header now and then."""
    from shmcache.cli import report

    before, then = report.without_self(cache.stats()), time.monotonic()
    lines = 0
    while True:
        time.sleep(seconds)
        after, now = report.without_self(cache.stats()), time.monotonic()
        if after.created == before.created:  # otherwise it was unlinked, and this is the next of that name
            rates = report.live_rates(before, after, now - then)
            if as_json:
                click.echo(text.as_json(report.live_json(after, rates)))
            else:
                if lines % 20 == 0:
                    click.echo(report.live_line(None, {}))
                click.echo(report.live_line(after, rates))
            lines += 1
            sys.stdout.flush()
        before, then = after, now


@shmcache.command()
@cache_name
@click.option("--prefix", help="Only the str keys that begin with this.")
@click.option("--json", "as_json", is_flag=True, help="Print each key as a line of JSON, for scripts.")
def keys(name: str, prefix: str | None, as_json: bool) -> None:
    """Print the keys of a cache. A line each, in no order: text as it is, other keys as Python writes them. No lock is
    taken, so a key that comes or goes meanwhile may be missed.

    \b
    Example: shmcache keys web --prefix user: | wc -l
    """
    with Cache.attach(name) as cache:
        show = text.as_json if as_json else text.show_key
        for key in cache.keys(prefix):
            click.echo(show(key))


@shmcache.command()
@cache_name
@click.argument("key")
@key_type
@as_json
def info(name: str, key: str, key_type: str, as_json: bool) -> None:
    """Show what is known about a key. That is when it expires, its version, the sizes of key and value, and the shard
    it is in; it does not count as a read. The exit status is 1 if the key is missing. A KEY that begins with a dash
    goes behind `--`.

    \b
    Example: shmcache info web user:17
    """
    wanted = parse(key, key_type, "KEY")
    with Cache.attach(name) as cache:
        try:
            entry = cache.info(wanted)
        except KeyError:
            fail_no_key(name, wanted)
    if as_json:
        click.echo(text.as_json(entry.as_dict()))
        return
    rows = [
        ("expires", "never" if entry.ttl is None else f"in {text.show_age(entry.ttl)}"),
        ("version", str(entry.version)),
        ("key size", text.show_size(entry.key_bytes)),
        ("value size", text.show_size(entry.value_bytes)),
        ("shard", str(entry.shard)),
    ]
    for line in text.table(("key", text.show_key(entry.key)), rows, "<<"):
        click.echo(line)


@shmcache.command()
@cache_name
@as_json
def check(name: str, as_json: bool) -> None:
    """Look for contradictions in a cache. Everything in it is compared with everything else; the exit status is 1 if
    something contradicts. Each shard is locked while it is looked at: writers wait, readers do not.

    \b
    Example: shmcache check web && echo fine
    """
    with Cache.attach(name) as cache:
        problems = cache.check()
    if as_json:
        click.echo(text.as_json({"name": name, "problems": problems}))
    else:
        click.echo("\n".join(problems or [f"{name}: no contradictions"]))
    if problems:
        raise click.exceptions.Exit(1)


@shmcache.command()
@click.argument("name", type=CacheName(), required=False)
@as_json
def doctor(name: str | None, as_json: bool) -> None:
    """Look for what is wrong, and say what to do about it. It looks at the engine, /dev/shm, limits, and stale files;
    and of every cache of this user, or of NAME only, at locks, processes, room and contents. It changes nothing, and
    waits a second at most for a lock that a process holds. The exit status is 1 if there is a problem; what is said as
    information is none. With --json, an array of objects with level (ok, info or problem), about, found and do.

    \b
    Example: shmcache doctor
    """
    from shmcache.cli import report
    from shmcache.cli.doctor import examine

    findings = []
    for finding in examine(name):
        findings.append(finding)
        if not as_json:
            for line in report.finding_lines(finding):
                click.echo(line)
    if as_json:
        click.echo(text.as_json([finding.as_dict() for finding in findings]))
    if any(finding.level == "problem" for finding in findings):
        raise click.exceptions.Exit(1)


@shmcache.command()
@cache_name
@as_json
def repair(name: str, as_json: bool) -> None:
    """Make a cache sound again, whatever `check` finds. Everything that follows from the entries is made anew, and
    entries that cannot be proved are dropped: a line each. Each shard is locked meanwhile. The exit status is 0, also
    when something was dropped.

    \b
    Example: shmcache repair web
    """
    with Cache.attach(name) as cache:
        dropped = cache.repair()
    if as_json:
        click.echo(text.as_json({"name": name, "dropped": dropped}))
    else:
        click.echo("\n".join(dropped or [f"{name}: nothing was dropped"]))


# --- reading and writing --------------------------------------------------------------------------------------------
@shmcache.command()
@cache_name
@click.argument("key")
@key_type
@as_json
@click.option("--raw", is_flag=True, help="Write a str or bytes exactly as stored, without a newline.")
def get(name: str, key: str, key_type: str, as_json: bool, raw: bool) -> None:
    """Print the value of a key. Text is printed as it is, anything else as Python writes it. It counts as a read, as
    that of any process does. The exit status is 1 if the key is missing. A KEY that begins with a dash goes behind
    `--`.

    \b
    Example: shmcache get web user:17 --json
    """
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    wanted = parse(key, key_type, "KEY")
    with Cache.attach(name) as cache:
        value = cache.get(wanted, DEFAULT)
    if value is DEFAULT:
        fail_no_key(name, wanted)
    if raw:
        if not isinstance(value, (str, bytes)):
            raise click.ClickException(f"--raw is for str and bytes, and the value is of type {type(value).__name__}")
        click.echo(value.encode() if isinstance(value, str) else value, nl=False)
    else:
        click.echo(text.as_json(value) if as_json else text.show_value(value))


@shmcache.command("set")
@cache_name
@click.argument("key")
@click.argument("value")
@key_type
@click.option(
    "--value-type",
    type=click.Choice(text.TYPES),
    default="str",
    show_default=True,
    help="What VALUE is: text, an int, the bytes as typed, JSON, or a Python literal.",
)
@click.option(
    "--ttl",
    type=TimeToLive(),
    default=DEFAULT,
    help='Expire after so many seconds; "none" for never.  [default: as the cache says]',
)
def set_(name: str, key: str, value: str, key_type: str, value_type: str, ttl: Any) -> None:
    """Store a value. The cache must exist; a VALUE of - is read from standard input. Prints nothing. A KEY or VALUE
    that begins with a dash goes behind `--`, and then so do all that follow.

    \b
    Example: shmcache set web user:17 '{"name": "Ada"}' --value-type json --ttl 60
    """
    wanted = parse(key, key_type, "KEY")
    if value == "-":
        read = sys.stdin.buffer.read()
        stored = read if value_type == "bytes" else parse(decode(read), value_type, "VALUE")
    else:
        stored = parse(value, value_type, "VALUE")
    with Cache.attach(name) as cache:
        cache.set(wanted, stored, ttl)


def decode(data: bytes) -> str:
    """Standard input as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.ClickException(f"standard input is not UTF-8 ({error}): use --value-type bytes") from None


@shmcache.command()
@cache_name
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@key_type
@as_json
def delete(name: str, keys: tuple[str, ...], key_type: str, as_json: bool) -> None:
    """Remove keys from a cache. Prints how many were there. The exit status is 1 if any was missing; the others are
    removed all the same. A KEY that begins with a dash goes behind `--`.

    \b
    Example: shmcache delete web user:17 user:18
    """
    wanted = [parse(key, key_type, "KEY") for key in keys]
    with Cache.attach(name) as cache:
        missing = [key for key in wanted if not cache.delete(key)]
    deleted = len(wanted) - len(missing)
    if as_json:
        click.echo(text.as_json({"deleted": deleted, "missing": missing}))
    else:
        click.echo(f"{deleted} deleted")
    if missing:
        fail_no_key(name, *missing)


# --- the whole cache ------------------------------------------------------------------------------------------------
@shmcache.command()
@cache_name
def clear(name: str) -> None:
    """Remove every entry of a cache. It does so for all its processes, without asking, and prints nothing.

    \b
    Example: shmcache clear web
    """
    with Cache.attach(name) as cache:
        cache.clear()


@shmcache.command()
@cache_name
def unlink(name: str) -> None:
    """Remove a cache from this machine. It does so without asking, also where the cache cannot be opened, and prints
    nothing. Processes that have it attached go on with a new, empty one of the same name.

    \b
    Example: shmcache unlink web
    """
    if not segment.unlink(name):
        raise CacheNotFound(f"there is no cache named {name!r}: `shmcache ls` lists those of this user")


# --- the demo -------------------------------------------------------------------------------------------------------
@shmcache.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=1, max=3600),
    default=5,
    show_default=True,
    help="How long the clients ask for pages.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=2, max=32),
    default=4,
    show_default=True,
    help="How many workers gunicorn has.",
)
@as_json
def demo(seconds: float, workers: int, as_json: bool) -> None:
    """See gunicorn workers share a cache. A real gunicorn on a free port of this machine serves pages that are slow to
    make, and clients ask for them. It shows which worker answered, and from what: a page it had made itself, one that
    another worker had made, or none, so that it had to be made. It ends by itself and leaves nothing behind. It needs
    gunicorn: pip install "shmcache[demo]".

    \b
    Example: shmcache demo --seconds 3 --workers 2
    """
    from shmcache.demo import run

    run(seconds, workers, as_json)
