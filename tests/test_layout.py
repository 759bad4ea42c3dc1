"""The layout says the same to Python and to C, and no two things share a word."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcache import Cache, segment
from shmcache.codec import Extension
from shmcache.engine import layout
from shmcache.engine.layout import Geometry
from shmcache.engine.primitives import key_hash, load
from tests.conftest import new_name

ENGINE = Path(layout.__file__).parent


def test_the_enum_for_c_equals_the_constants() -> None:
    """layout.pxd has every int of layout.py but MAGIC, which is no C int, with the same value."""
    here = {name: value for name, value in vars(layout).items() if name.isupper() and type(value) is int}
    pxd = (ENGINE / "layout.pxd").read_text()
    there = {name: int(value) for name, value in re.findall(r"^    (\w+) = (\d+)$", pxd, re.MULTILINE)}
    assert here.pop("MAGIC") == int.from_bytes(b"SHMCACHE", "big")
    assert there == here


def test_the_extension_of_a_large_integer_is_that_of_the_codec() -> None:
    assert layout.BIG_INT == Extension.BIG_INT


def test_the_log_has_the_same_length_in_c() -> None:
    """The C body of logged_store has the number of entries as a macro of its own."""
    macro = re.search(r"#define SHM_LOG_ENTRIES (\d+)", (ENGINE / "primitives.pxd").read_text())
    assert macro is not None
    assert int(macro[1]) == layout.LOG_ENTRIES


@given(
    max_bytes=st.integers(30_000, 1 << 40),
    max_entries=st.none() | st.integers(1, 1 << 24),
    shards=st.none() | st.integers(1, layout.MAX_SHARDS),
)
def test_regions_fill_the_segment_without_overlap(max_bytes: int, max_entries: int | None, shards: int | None) -> None:
    """Every part begins where the one before ends, on a cache line, and the last ends within the file."""
    try:
        geometry = Geometry.plan(max_bytes, max_entries, shards)
    except ValueError:
        return
    end = layout.HEADER_WORDS + geometry.processes * layout.PROCESS_WORDS
    for shard in range(geometry.shards):
        region = geometry.region(shard)
        starts = [region.header, region.log, region.bins, region.wheel, region.buckets, region.slots, region.blocks]
        assert region.header == end
        assert all(start % 8 == 0 for start in starts)
        assert region.log - region.header == layout.SHARD_WORDS
        assert region.bins - region.log >= layout.L_ENTRIES + 2 * layout.LOG_ENTRIES
        assert region.wheel - region.bins >= layout.BIN_BITMAP_WORDS + layout.BINS
        assert region.buckets - region.wheel == layout.WHEEL_LISTS
        assert region.slots - region.buckets >= geometry.slots
        assert region.blocks - region.slots == geometry.slots * layout.SLOT_WORDS
        end = region.end
    assert end * 8 <= geometry.file_bytes
    assert geometry.file_bytes + (geometry.shards + 1) * layout.PAGE <= max_bytes
    assert geometry.file_bytes - end * 8 < geometry.shards * 64 + layout.PAGE
    assert geometry.slots * geometry.shards >= geometry.max_entries


def test_too_small_a_cache_is_told_how_much_it_needs() -> None:
    """The size in the message is enough, and a page less is not."""
    with pytest.raises(ValueError, match="at least") as caught:
        Geometry.plan(20_000, 100, 1)
    found = re.search(r"at least (\d+) bytes", str(caught.value))
    assert found is not None
    needed = int(found[1])
    assert Geometry.plan(needed, 100, 1).blocks >= 1
    with pytest.raises(ValueError, match="too small"):
        Geometry.plan(needed - layout.PAGE, 100, 1)


def test_default_shards_grow_with_the_cache() -> None:
    """Small caches have one shard and so one exact order; none is made of less than 4 MB or 2,048 entries."""
    assert Geometry.plan(1 << 20, None, None).shards == 1
    assert Geometry.plan(1 << 30, 1000, None).shards == 1
    assert Geometry.plan(1 << 30, None, None).shards == 16
    assert Geometry.plan(64 << 20, None, None).shards == 16
    assert Geometry.plan(1 << 30, 10_000, None).shards == 4
    for megabytes in (7, 8, 32, 64, 100, 256, 1000):
        geometry = Geometry.plan(megabytes << 20, None, None)
        assert geometry.max_bytes // geometry.shards >= 4 << 20


@pytest.mark.parametrize("pattern", ["{}", "user:{}:profile", "{:032}", "{}" + "x" * 40, "x" * 40 + "{}"])
def test_similar_keys_spread_evenly(pattern: str) -> None:
    """Keys that count up share no hash, and fill buckets and shards as chance would."""
    rng = random.Random(pattern)
    secret0, secret1 = rng.getrandbits(64), rng.getrandbits(64)
    keys = [pattern.format(number).encode() for number in range(20_000)]
    hashes = [key_hash(key, len(key), layout.KEY_TEXT, secret0, secret1) for key in keys]
    assert len(set(hashes)) == len(keys)
    for shift in (0, 16, 32, 56):  # whence the bucket, the tag and the shard are taken
        counts = [0] * 256
        for hashed in hashes:
            counts[hashed >> shift & 255] += 1
        chi_square = sum((count - 20_000 / 256) ** 2 / (20_000 / 256) for count in counts)
        assert chi_square < 255 + 6 * (2 * 255) ** 0.5


def test_kinds_of_key_hash_apart() -> None:
    """The same bytes as a str, as bytes and as msgpack are different keys."""
    assert len({key_hash(b"same bytes", 10, kind, 3**40, 5**27) for kind in (1, 2, 3)}) == 3


def test_no_difference_of_keys_cancels_that_of_their_kinds() -> None:
    """A kind that is xored to the seed is undone by a key with the like bit flipped, whatever the secret."""
    for size in (5, 16, 40):
        key = bytes(range(65, 65 + size))
        alike = [key] + [key[:at] + bytes([key[at] ^ bits]) + key[at + 1 :] for at in range(size) for bits in (1, 2, 3)]
        hashes = {key_hash(each, size, kind, 3**40, 5**27) for each in alike for kind in (1, 2, 3)}
        assert len(hashes) == 3 * len(alike)


def test_the_stored_hash_is_the_one_of_the_python_body(make_cache: Callable[..., Cache]) -> None:
    """Compiled and uncompiled code hash alike: what lies in the slots equals what primitives.py computes."""
    cache = make_cache(max_bytes="1MB", max_entries=200, shards=1)
    keys = ["k" * size for size in range(1, 70)] + ["é", "日本語"]
    cache.set_many(dict.fromkeys(keys, 0))
    attachment = cache._attachment
    region = attachment.geometry.region(0)
    stored = {
        load(attachment.words, region.slots + slot * layout.SLOT_WORDS + layout.E_HASH)
        for slot in range(attachment.geometry.slots)
        if load(attachment.words, region.slots + slot * layout.SLOT_WORDS + layout.E_PLACE) & 0xFFFF_FFFF
    }
    encoded = [key.encode() for key in keys]
    assert stored == {key_hash(key, len(key), layout.KEY_TEXT, *attachment.secret) for key in encoded}


def test_no_slot_has_a_number_that_stands_for_a_list() -> None:
    assert segment.MAX_ENTRIES < layout.WHEEL_FIRST
    with pytest.raises(ValueError, match="expected 1 to 2,147,483,647"):
        Cache(new_name(), max_bytes=1 << 40, max_entries=1 << 31, shards=1)
