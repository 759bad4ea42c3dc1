"""What SECURITY.md promises: other users neither see nor change a cache, nor pose as one; keys cannot be chosen to
collide; and nothing is unpickled unasked.

The other user is a real one. Only root can become one, so where the tests are run by somebody else, these are skipped,
and of the checks only what one user can show alone is tested.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pickle
import signal
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest

import shmcache.cache
from shmcache import Cache, CacheNotFound, IncompatibleSegment, SerializationError, is_compiled, segment
from shmcache.cli import doctor
from shmcache.codec import Codec, encode_key
from shmcache.engine import layout
from shmcache.engine.bytelock import is_byte_locked
from shmcache.engine.primitives import key_hash, load
from tests.conftest import new_name
from tests.processes import Family, run_python

MakeCache = Callable[..., Cache]

STRANGER = 65_534
ORDINARY = 65_533  # a user as the victim: what root meets and what others meet is not the same
NOT_KEPT_OUT = 10.0  # seconds; a lease keeps who opens the file for 45


def can_be_others() -> bool:
    """Whether this process can become either user: it is root, and its user namespace has them."""
    with contextlib.suppress(OSError):
        ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if not all(any(first <= uid < first + count for first, _, count in ranges) for uid in (STRANGER, ORDINARY)):
            return False
    return os.geteuid() == 0


two_users = pytest.mark.skipif(not can_be_others(), reason="only root can become another user")
protected_links = pytest.mark.skipif(
    not Path("/proc/sys/fs/protected_hardlinks").exists()
    or Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "0",
    reason="fs.protected_hardlinks is off: anybody may link to anything here",
)


def become(uid: int) -> None:
    """Be this user from now on, with no way back."""
    if uid != os.geteuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def work_as(uid: int, work: Callable[..., object], *args: object) -> None:
    """Become this user, then do the work: for a child."""
    become(uid)
    work(*args)


def as_user(uid: int, work: Callable[..., object], *args: object) -> None:
    """Do the work in a process of this user; the test fails where the work does."""
    with Family() as family:
        assert family.fork(work_as, uid, work, *args).wait() == 0


def paths(name: str, uid: int) -> dict[str, Path]:
    """Where the files of a cache with one shard are, whoever asks."""
    own = f"shmcache-{uid}-{name}"
    return {
        "segment": Path(segment.DIRECTORY) / own,
        "lock file": Path(segment.DIRECTORY) / f"{own}~lock",
        "semaphore": Path(segment.DIRECTORY) / f"sem.{own}~0",
    }


@pytest.fixture
def place() -> Iterator[str]:
    """A name for a cache of any user, or for a file; at the end whatever anybody has put under it is removed."""
    name = new_name()
    yield name
    for path in Path(segment.DIRECTORY).glob(f"*{name}*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def refuses(name: str, *says: str) -> None:
    """Neither way of attaching succeeds or hangs, and the message says who is in the way and what to do."""
    for attach in (Cache, Cache.attach):
        began = time.monotonic()
        with pytest.raises(IncompatibleSegment) as caught:
            attach(name)
        assert time.monotonic() - began < NOT_KEPT_OUT
        for text in (*says, "or use another cache name"):
            assert text in str(caught.value)


# --- a cache that is there ------------------------------------------------------------------------------------------
@two_users
@pytest.mark.parametrize("owner", [0, ORDINARY], ids=["root", "user"])
def test_a_stranger_can_do_nothing_with_the_files_of_a_cache(place: str, owner: int) -> None:
    files = paths(place, owner)

    def create() -> None:
        cache = Cache(place, max_bytes="1MB", max_entries=100)
        cache.set("secret", "of its owner")
        os.kill(os.getpid(), signal.SIGSTOP)  # it stays attached
        assert (cache.get("secret"), cache.check()) == ("of its owner", [])
        cache.unlink()

    def intrude(pid: int) -> None:
        for path in files.values():
            attempts: list[tuple[Callable[..., object], object]] = [
                (os.open, os.O_RDONLY),
                (os.open, os.O_WRONLY),
                (os.open, os.O_RDWR),
                (os.open, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
                (os.truncate, 0),
                (os.chmod, 0o666),
                (os.utime, None),
                (os.rename, f"{path}-mine"),
            ]
            for attempt, argument in attempts:
                with pytest.raises(PermissionError):
                    attempt(path, argument)
            with pytest.raises(PermissionError):
                os.unlink(path)
        # Nor by way of the process that has it, open files and memory included.
        for name in ("fd", "map_files", "mem", "environ"):
            with pytest.raises(PermissionError):
                os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                os.listdir(f"/proc/{pid}/{name}")
        with pytest.raises(PermissionError):
            os.kill(pid, 0)

        # The same name is another cache; to be taken for the owner's does not help either.
        with Cache(place, max_bytes="1MB") as own:
            assert own.get("secret") is None
            own.unlink()
        segment.file_name = lambda name: f"shmcache-{owner}-{name}"
        refuses(place, f"belongs to uid {owner}", f"expected a regular file of uid {STRANGER}")
        with pytest.raises(IncompatibleSegment, match=f"have uid {owner} or root remove it" if owner else "uid 0"):
            segment.unlink(place)

    with Family() as family:
        holder = family.fork(work_as, owner, create)
        holder.wait_until_stopped()
        before = {what: path.stat() for what, path in files.items()}
        assert {stat.filemode(status.st_mode) for status in before.values()} == {"-rw-------"}
        assert {status.st_uid for status in before.values()} == {owner}
        assert family.fork(work_as, STRANGER, intrude, holder.pid).wait() == 0
        assert {what: path.stat() for what, path in files.items()} == before
        holder.signal(signal.SIGCONT)
        assert holder.wait() == 0


@two_users
@protected_links
def test_a_stranger_cannot_keep_a_removed_cache_by_a_link(place: str) -> None:
    Cache(place, max_bytes="1MB").close()

    def link() -> None:
        for path in paths(place, 0).values():
            with pytest.raises(PermissionError):
                os.link(path, f"{path}-mine")

    as_user(STRANGER, link)


@two_users
def test_root_has_caches_of_its_own(place: str) -> None:
    """Root could open everybody's files, and so is not led to: a name is root's own cache, or none."""
    as_user(ORDINARY, lambda: Cache(place, max_bytes="1MB").set("whose", "the user's"))
    with pytest.raises(CacheNotFound):
        Cache.attach(place)
    assert place not in segment.names()
    assert not segment.unlink(place)
    with Cache(place, max_bytes="1MB") as cache:
        assert cache.get("whose") is None
    as_user(ORDINARY, lambda: Cache.attach(place)["whose"])


@two_users
def test_who_counts_is_the_effective_user(place: str) -> None:
    """In a setuid program, the user it acts for: files are that user's, and so is the cache."""

    def act() -> None:
        os.setresgid(STRANGER, ORDINARY, ORDINARY)
        os.setresuid(STRANGER, ORDINARY, ORDINARY)
        with Cache(place, max_bytes="1MB") as cache:
            cache.set("from", "a setuid program")
        assert {path.stat().st_uid for path in paths(place, ORDINARY).values()} == {ORDINARY}

    with Family() as family:
        assert family.fork(act).wait() == 0
    as_user(ORDINARY, lambda: Cache.attach(place)["from"])


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_files_of_a_cache_are_for_its_user_only(place: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        Cache(place, max_bytes="1MB").close()
    finally:
        os.umask(before)
    for path in paths(place, os.geteuid()).values():
        status = path.stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o600, os.geteuid())


# --- a name that is taken -------------------------------------------------------------------------------------------
def put_link(path: Path, mode: int) -> None:
    path.symlink_to(Path(segment.DIRECTORY) / f"{path.name}-precious")


def put_dangling_link(path: Path, mode: int) -> None:
    path.symlink_to(Path(segment.DIRECTORY) / f"{path.name}-created")


def put_socket(path: Path, mode: int) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def put_leased_file(path: Path, mode: int) -> None:
    """Whoever opens it has to wait until this process gives the lease back, or for 45 s."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    os.chmod(path, mode)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


SQUATS: dict[str, Callable[[Path, int], object]] = {
    "an empty file": lambda path, mode: path.touch(mode),
    "a file": lambda path, mode: path.write_bytes(b"x" * 4096),
    "a pipe": os.mkfifo,
    "a directory": lambda path, mode: path.mkdir(mode),
    "a link": put_link,
    "a dangling link": put_dangling_link,
    "a socket": put_socket,
    "a leased file": put_leased_file,
}


@two_users
@pytest.mark.parametrize("owner", [0, ORDINARY], ids=["root", "user"])
@pytest.mark.parametrize("which", ["segment", "lock file"])
@pytest.mark.parametrize("squat", SQUATS)
def test_a_name_that_a_stranger_has_taken_is_refused(place: str, squat: str, which: str, owner: int) -> None:
    """At once, without opening, following, changing or removing what is there."""
    path = paths(place, owner)[which]
    precious = Path(segment.DIRECTORY) / f"{path.name}-precious"
    precious.write_bytes(b"precious")
    precious.chmod(0o600)
    os.chown(precious, owner, owner)

    def take(mode: int) -> None:
        SQUATS[squat](path, mode)
        if not path.is_symlink():
            path.chmod(mode)
        os.kill(os.getpid(), signal.SIGSTOP)  # a lease goes with its holder

    for mode in (0o666, 0o600):
        with Family() as family:
            taker = family.fork(work_as, STRANGER, take, mode)
            taker.wait_until_stopped()
            before = path.lstat()
            does = "remove it" if owner == 0 else f"have uid {STRANGER} or root remove it"
            as_user(owner, refuses, place, f"{path} belongs to uid {STRANGER} with mode", does)
            after = path.lstat()
            assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert precious.read_bytes() == b"precious"
    assert not (Path(segment.DIRECTORY) / f"{path.name}-created").exists()

    # Once it is gone, nothing is left of that.
    as_user(owner, lambda: Cache(place, max_bytes="1MB").set("k", 1))
    as_user(owner, lambda: Cache.attach(place)["k"])


@two_users
@pytest.mark.parametrize("which", ["segment", "lock file"])
def test_a_device_in_the_way(place: str, which: str) -> None:
    path = paths(place, ORDINARY)[which]
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    path.chmod(0o666)
    as_user(ORDINARY, refuses, place, "belongs to uid 0 with mode crw-rw-rw-", "have uid 0 or root remove it")


@pytest.mark.parametrize("which", ["segment", "lock file"])
@pytest.mark.parametrize("squat", ["a pipe", "a directory", "a link", "a dangling link", "a socket"])
def test_what_is_no_plain_file_is_refused_whosever_it_is(place: str, squat: str, which: str) -> None:
    """A link could lead anywhere, and a pipe could keep us waiting."""
    path = paths(place, os.geteuid())[which]
    precious = Path(segment.DIRECTORY) / f"{path.name}-precious"
    precious.write_bytes(b"precious")
    precious.chmod(0o600)
    SQUATS[squat](path, 0o600)
    refuses(place, f"{path} belongs to uid {os.geteuid()} with mode", ": remove it")
    assert precious.read_bytes() == b"precious"
    assert not (Path(segment.DIRECTORY) / f"{path.name}-created").exists()


def test_files_that_others_may_open_are_refused(place: str) -> None:
    Cache(place, max_bytes="1MB").close()
    files = paths(place, os.geteuid())
    for path in (files["segment"], files["lock file"]):
        for mode in (0o644, 0o660, 0o602, 0o604):
            path.chmod(mode)
            refuses(place, "with mode -rw", "nobody else may open (0600)", ": remove it")
            assert path.stat().st_mode & 0o777 == mode
        path.chmod(0o600)
    Cache.attach(place).close()


def test_another_cache_linked_to_a_name_is_not_taken_for_it(place: str) -> None:
    """Where fs.protected_hardlinks is off a stranger can link any file: both names would be one cache."""
    posed = f"{place}-posed"
    with Cache(place, max_bytes="1MB") as cache:
        cache.set("k", "of the other cache")
    files, links = paths(place, os.geteuid()), paths(posed, os.geteuid())
    for what in ("lock file", "segment"):
        os.link(files[what], links[what])
        refuses(posed, f"{links['lock file']} belongs to uid" if what == "lock file" else "", "and 2 names")
    # A segment alone is no cache either: it names its lock file, but what has two names may be anybody's.
    links["lock file"].unlink()
    refuses(posed, f"{links['segment']} belongs to uid", "and 2 names")
    links["segment"].unlink()
    with Cache.attach(place) as cache:
        assert (cache["k"], cache.check()) == ("of the other cache", [])


@two_users
@pytest.mark.parametrize("owner", [0, ORDINARY], ids=["root", "user"])
@pytest.mark.parametrize("squat", ["an empty file", "a file", "a pipe", "a directory", "a link", "a leased file"])
def test_a_semaphore_that_a_stranger_has_put_there_is_not_opened(place: str, squat: str, owner: int) -> None:
    """Its owner could cut it short, which would end every waiter with SIGBUS. The cache works without."""
    path = paths(place, owner)["semaphore"]
    precious = Path(segment.DIRECTORY) / f"{path.name}-precious"
    precious.write_bytes(bytes(32))
    precious.chmod(0o600)
    os.chown(precious, owner, owner)

    def take() -> None:
        SQUATS[squat](path, 0o666)
        if not path.is_symlink():
            path.chmod(0o777)
        os.kill(os.getpid(), signal.SIGSTOP)

    def create() -> Cache:
        return Cache(place, max_bytes="1MB", max_entries=100)

    def use() -> None:
        cache = create()
        [sleeper] = cache._attachment.sleepers
        began = time.monotonic()
        sleeper.wake()
        assert not sleeper.sleep()
        assert sleeper._semaphore is None
        assert time.monotonic() - began < NOT_KEPT_OUT
        assert path.lstat().st_uid == STRANGER
        cache.set("k", 1)
        assert (cache["k"], cache.check()) == (1, [])

    as_user(owner, create)
    path.unlink()
    with Family() as family:
        taker = family.fork(work_as, STRANGER, take)
        taker.wait_until_stopped()
        as_user(owner, use)
        as_user(owner, segment.unlink, place)
        if os.path.lexists(path):
            as_user(owner, use)  # it is created anew, and the semaphore is not
        else:
            assert owner == 0, "who else could remove it?"
    assert precious.read_bytes() == bytes(32)


def test_names_that_no_cache_has_are_not_listed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may put a file of any name into /dev/shm, and a terminal does what the codes in a name say."""
    monkeypatch.setattr(segment, "DIRECTORY", str(tmp_path))  # doctor looks at every cache there is
    for other in ("a\x1b[2J", "a\nroot 1.0GB", ".a", "a" * 101, "a\udcff", name):
        (tmp_path / f"{segment.file_name(other)}~lock").touch()
    assert segment.names() == [name]
    about = {finding.about for finding in doctor.examine()}
    assert name in about
    assert all(each.isprintable() for each in about)


# --- this process's locks -------------------------------------------------------------------------------------------
def test_looking_at_a_cache_does_not_drop_the_locks_of_who_has_it(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX locks of a process go when it closes any descriptor of the file: nothing opens it a second time."""
    from click.testing import CliRunner

    from shmcache.cli.commands import shmcache as command

    for ephemeral in (False, True):
        cache = make_cache(max_bytes="1MB", max_entries=100, ephemeral=ephemeral)
        cache.set("k", 1)
        line = cache._attachment.registry.own_line

        def is_held(cache: Cache = cache, line: int = line) -> None:
            assert is_byte_locked(cache._attachment.lock_fd, line)

        as_user(os.geteuid(), is_held)
        assert list(doctor.examine(cache.name))
        assert not segment.is_left_over(cache.name, 1.0)
        assert cache.name in segment.names()
        monkeypatch.setattr(segment, "names", lambda name=cache.name: [name])  # or `ls` attaches to those of others
        for arguments in (["ls"], *([name, cache.name] for name in ("stats", "keys", "check", "repair", "doctor"))):
            assert CliRunner().invoke(command, arguments).exit_code in (0, 1)
        assert CliRunner().invoke(command, ["info", cache.name, "k"]).exit_code == 0
        Cache.attach(cache.name).close()
        pickle.loads(pickle.dumps(cache)).close()
        cache.stats()
        as_user(os.geteuid(), is_held)
        monkeypatch.undo()


# --- keys chosen to collide -----------------------------------------------------------------------------------------
def steps(cache: Cache) -> tuple[float, int]:
    """How many links a reader follows to an entry, on average and at most: counted in the table itself."""
    words, geometry = cache._attachment.words, cache._attachment.geometry
    lengths = []
    for shard in range(geometry.shards):
        region = geometry.region(shard)
        for bucket in range(geometry.slots):
            length, link = 0, load(words, region.buckets + bucket)
            while link:
                length += 1
                slot = (link & 0xFFFF_FFFF) - 1
                link = load(words, region.slots + slot * layout.SLOT_WORDS + layout.E_CHAIN)
            lengths.append(length)
    return sum(length * (length + 1) // 2 for length in lengths) / sum(lengths), max(lengths)


def murmur3(data: bytes) -> int:
    """MurmurHash3, 32 bits, without a seed, of whole words; its avalanche at the end is left out: it is a bijection."""
    state = 0
    for at in range(0, len(data), 4):
        word = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & 0xFFFF_FFFF
        state ^= (word << 15 | word >> 17) * 0x1B873593 & 0xFFFF_FFFF
        state = ((state << 13 | state >> 19) & 0xFFFF_FFFF) * 5 + 0xE6546B64 & 0xFFFF_FFFF
    return state


def for_murmur3(number: int) -> bytes:
    """Eight bytes after which murmur3 is where it was: the second word undoes what the first one did."""
    first = number.to_bytes(4, "little")
    left = murmur3(first)
    wanted = (0 - 0xE6546B64) * pow(5, -1, 1 << 32) & 0xFFFF_FFFF
    word = (left ^ (wanted >> 13 | wanted << 19) & 0xFFFF_FFFF) * pow(0x1B873593, -1, 1 << 32) & 0xFFFF_FFFF
    word = ((word >> 15 | word << 17) & 0xFFFF_FFFF) * pow(0xCC9E2D51, -1, 1 << 32) & 0xFFFF_FFFF
    return first + word.to_bytes(4, "little")


def polynomial(factor: int) -> Callable[[str], int]:
    def hashed(text: str) -> int:
        total = 0
        for letter in text:
            total = (total * factor + ord(letter)) & 0xFFFF_FFFF
        return total

    return hashed


def pairs(one: str, other: str) -> Iterator[str]:
    return map("".join, itertools.product((one, other), repeat=14))


def ours(key: bytes, secret: tuple[int, int] = (0, 0)) -> int:
    return key_hash(key, len(key), layout.KEY_BYTES, *secret)


def for_our_secret_0(end: bytes) -> Iterator[bytes]:
    """Eight zero bytes make a product zero, whatever is multiplied by them."""
    return (bytes(8) + b"%08d" % number + end for number in itertools.count())


def crafted_keys() -> Iterator[tuple[Callable[[Any], int], Iterator[Any]]]:
    """Hash functions without a secret, each with keys that all have one hash by it."""
    yield polynomial(31), pairs("Aa", "BB")  # Java's
    yield polynomial(33), pairs("Ez", "FY")  # Bernstein's
    yield hash, (number * sys.hash_info.modulus for number in itertools.count())
    yield zlib.crc32, (key + zlib.crc32(key).to_bytes(4, "little") for key in map(b"%08d".__mod__, itertools.count()))
    yield murmur3, map(for_murmur3, itertools.count())
    yield ours, for_our_secret_0(b"")
    yield ours, for_our_secret_0(b"the same end")


def fill(cache: Cache, keys: Iterable[Any]) -> tuple[float, int]:
    """Store these keys and no others; the steps they take."""
    cache.clear()
    for key in keys:  # not in a dict, which would be flooded by those made against Python's hash
        cache.set(key, 0)
    return steps(cache)


def test_keys_that_collide_elsewhere_do_not_here(make_cache: MakeCache) -> None:
    """As many chosen keys as there are buckets take as long as random ones: the links to follow are counted."""
    count = 10_000 if is_compiled() else 1_000
    cache = make_cache(max_bytes="8MB", max_entries=count, shards=4)
    ordinary, longest = fill(cache, (os.urandom(12) for _ in range(count)))
    assert 1 < ordinary < 2
    assert longest < 20
    with Cache(new_name(), max_bytes="1MB") as known:
        secret = known._attachment.secret
        known.unlink()
    assert 0 not in secret
    assert not {*secret} & {*cache._attachment.secret}, "who knows the secret of one cache knows nothing of the next"
    of_another = (secret[1].to_bytes(8, sys.byteorder) + b"%08d" % number for number in itertools.count())
    families: list[tuple[Callable[[Any], int], Iterator[Any]]] = [*crafted_keys()]
    families.append((partial(ours, secret=secret), of_another))
    for hashed, crafted in families:
        keys = list(itertools.islice(crafted, count))
        assert len(set(map(hashed, keys))) == 1
        mean, longest = fill(cache, keys)
        assert mean < 2 * ordinary
        assert longest < 20
        assert len(cache) == count, "no shard got so many that it had to evict"


def test_without_the_secret_they_would_collide(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tests above would notice."""
    monkeypatch.setattr("os.urandom", bytes)
    cache = make_cache(max_bytes="1MB", max_entries=400, shards=1)
    assert cache._attachment.secret == (0, 0)
    for end in (b"", b"the same end"):
        assert fill(cache, itertools.islice(for_our_secret_0(end), 400)) == (200.5, 400)


# --- pickle ---------------------------------------------------------------------------------------------------------
class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


class Raw(Codec):
    """Stores the bytes in a list as they are."""

    __slots__ = ()

    def encode(self, value: object) -> bytes:
        return bytes(value[0]) if type(value) is list else super().encode(value)


def hostile_values(pickled: bytes) -> Iterator[bytes]:
    """Pickled bytes as whatever msgpack can say they are, and in whatever it can put them into."""
    yield msgpack.packb(msgpack.ExtType(32, pickled))
    yield pickled
    for code in range(-128, 128):
        extension: bytes = msgpack.packb(msgpack.ExtType(code, pickled)) if code >= 0 else b""
        if code < 0:  # such as the timestamp of msgpack
            extension = b"\xc8" + len(pickled).to_bytes(2, "big") + code.to_bytes(1, "big", signed=True) + pickled
        yield extension
        yield b"\x92\x01" + extension
        yield b"\x81\xa1k" + extension
        yield b"\x81" + extension + b"\x01"
        for container in (1, 2, 3):
            yield msgpack.packb(msgpack.ExtType(container, b"\x91" + extension))
    for code in (13, 14):
        for dtype in ("|O", "O", "|O8", "object", [["a", "|O"]]):
            header = msgpack.packb([dtype, "C", [1] if code == 13 else []])
            yield msgpack.packb(msgpack.ExtType(code, len(header).to_bytes(4, "big") + header + pickled))


def test_nothing_is_unpickled_unasked(make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "unpickled"
    pickled = pickle.dumps(Evil(trace))
    values = [*hostile_values(pickled)]
    name = new_name()
    with monkeypatch.context() as patch:
        patch.setattr(shmcache.cache, "Codec", Raw)
        writer = make_cache(name, max_bytes="4MB", shards=1)
    writer.set_many({number: [value] for number, value in enumerate(values)})
    key = b"\xc7" + bytes([len(pickled), 32]) + pickled
    lookalike = ("k" * (len(pickled) - 3),)
    assert len(encode_key(lookalike)) == len(key)

    def read(serializer: Any) -> None:
        found: list[str] = []
        sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
        reader = Cache.attach(name, serializer=serializer)
        memoized = reader.memoize(key=lambda number: number, name="f")(lambda number: "computed")
        writer.set(memoized.cache_key(1), [values[0]])
        for number in range(len(values)):
            for method in (reader.get, reader.gets, reader.__getitem__, reader.incr):
                with contextlib.suppress(SerializationError, TypeError, ArithmeticError):
                    method(number)
            with contextlib.suppress(SerializationError):
                reader.get_many([number])
        with contextlib.suppress(SerializationError):
            memoized(1)
        for walk in (reader.items, reader.values):
            with contextlib.suppress(SerializationError):
                list(walk())
        # A key as well.
        writer.set(lookalike, 0)
        at = bytes(reader._attachment.data).index(encode_key(lookalike))
        reader._attachment.data[at : at + len(key)] = key
        with pytest.raises(SerializationError):
            list(reader.keys())
        list(doctor.examine(name))
        assert reader.check()
        assert reader.repair()
        for number in range(len(values)):
            with contextlib.suppress(SerializationError):
                reader.pop(number)
        reader.clear()
        assert found == []

    def read_as_asked() -> None:
        found: list[str] = []
        sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
        Cache.attach(name, serializer="pickle").get(0)
        assert found == ["pickle.find_class"], "the hook would have noticed"

    class Other:
        def dumps(self, obj: Any) -> bytes:
            return b""

        def loads(self, data: bytes) -> Any:
            raise ValueError("not for me")

    with Family() as family:
        assert family.fork(read_as_asked).wait() == 0
        assert trace.is_dir()
        trace.rmdir()
        for serializer in (Other(), "msgpack"):
            assert family.fork(read, serializer).wait() == 0
            writer.set_many({number: [value] for number, value in enumerate(values)})
    assert not trace.exists()
    # The command line is a reader like any other.
    program = """
import sys
found = []
sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
from click.testing import CliRunner
from shmcache.cli.commands import shmcache
def run(*arguments):
    return CliRunner().invoke(shmcache, arguments).exit_code
name, pickled = sys.argv[1:]
assert run("get", name, "--key-type", "int", pickled) == 1
assert run("info", name, "--key-type", "int", pickled) == 0
assert run("keys", name) == run("ls") == run("stats", name) == run("check", name) == 0
print(found)
"""
    assert run_python(program, name, "0") == "[]\n"
    assert not trace.exists()


def test_what_a_cache_for_pickle_holds_needs_to_be_asked_for(make_cache: MakeCache) -> None:
    """The serializer is a choice of each process, not of the segment, so nobody can make it for another."""
    trusting = make_cache(max_bytes="1MB", serializer="pickle")
    trusting.set("k", {1: 2})
    trusting.set("scalar", 3)
    with Cache(trusting.name) as cache:
        assert cache["scalar"] == 3
        with pytest.raises(SerializationError, match=r"written with pickle.*serializer=\"pickle\""):
            cache.get("k")
        cache.set("other way", (4, {5}))
    assert trusting["other way"] == (4, {5})
