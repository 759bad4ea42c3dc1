"""What is stored and asked for: every peer gets the very same keys and values, in the same order in every run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]

SEED = 20

VALUES: dict[str, Any] = {
    "str 20": "value of 20 characte",
    "dict 5": {"id": 123_456, "name": "Ada Lovelace", "email": "ada@example.org", "admin": False, "score": 9.75},
    "1 KiB": random.Random(SEED).randbytes(1 << 10),
    "64 KiB": random.Random(SEED).randbytes(64 << 10),
    "1 MiB": random.Random(SEED).randbytes(1 << 20),
}


def packed_size(value: Any) -> int:
    """The bytes of a value as msgpack."""
    return len(msgpack.packb(value))


def key(number: int, prefix: str = "user") -> str:
    return f"{prefix}:{number:08d}:profile"


def keys(count: int, prefix: str = "user") -> list[str]:
    return [key(number, prefix) for number in range(count)]


def long_keys(count: int, first: int = 0) -> list[str]:
    """Keys of 50 bytes."""
    return [f"{'tenant/eu-west/catalogue/item/':-<38}{number:012d}" for number in range(first, first + count)]


def zipf(of: Sequence[str], count: int, seed: int = SEED) -> list[str]:
    """`count` draws where the n-th key comes up 1/n as often as the first; which is the n-th is chance."""
    draw = random.Random(seed)
    order = draw.sample(of, len(of))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(order) + 1)))
    return draw.choices(order, cum_weights=weights, k=count)


def mix(of: Sequence[str], count: int, seed: int) -> list[tuple[int, str]]:
    """80 % get (0), 15 % set (1), 5 % delete (2), of keys by Zipf."""
    draw = random.Random(seed)
    operations = draw.choices((0, 1, 2), weights=(80, 15, 5), k=count)
    return list(zip(operations, zipf(of, count, seed), strict=True))


def sizes_below(size: int, seed: int = SEED) -> Iterator[int]:
    """Sizes from a third of `size` to all of it, for ever."""
    draw = random.Random(seed)
    while True:
        yield draw.randint(size // 3, size)
