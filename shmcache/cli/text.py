"""Text of the command line: arguments to keys and values, and keys, values, sizes, times and tables to text."""

from __future__ import annotations

import ast
import base64
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from typing import Any

from shmcache.codec import encode_key

__all__ = [
    "TYPES",
    "as_json",
    "hint_at_type",
    "parse",
    "show_age",
    "show_key",
    "show_ratio",
    "show_size",
    "show_value",
    "table",
]


# --- arguments ------------------------------------------------------------------------------------------------------
def _not_a_constant(name: str) -> object:
    raise ValueError(f"it has no {name}")


def _from_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_a_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _from_python(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(error.msg) from None
    except (ValueError, TypeError):  # their messages show objects of the parser
        raise ValueError(
            "a literal has str, bytes, numbers, tuples, lists, dicts, sets, True, False and None only"
        ) from None
    except (MemoryError, RecursionError):
        raise ValueError("it is nested too deep") from None


def _from_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # the shell gave other bytes
        raise ValueError("it is not UTF-8: give it the type bytes") from None
    return text


def _from_digits(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("digits, with a sign or not, were expected") from None


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": _from_utf8,
    "int": _from_digits,
    "bytes": os.fsencode,
    "json": _from_json,
    "python": _from_python,
}
TYPES = tuple(_PARSERS)
"""What an argument may be said to be: text, a number, the bytes as typed, JSON, or a Python literal."""


def parse(text: str, kind: str, is_key: bool = False) -> Any:
    """The key or value that an argument stands for; raises ValueError. A JSON array is a tuple in a key."""
    try:
        value = _PARSERS[kind](text)
    except ValueError as error:
        meant = {"str": "text", "int": "an int", "json": "JSON", "python": "a Python literal"}.get(kind, kind)
        raise ValueError(f"{text!r} is not {meant}: {error}") from None
    if not is_key:
        return value
    key = _tuples(value) if kind == "json" else value
    encode_key(key)
    return key


def hint_at_type(text: str) -> str | None:
    """What else the text of a str key may stand for, as an option of the command line; None if that is unlikely."""
    try:
        literal = ast.literal_eval(text)
        if isinstance(literal, (int, list)) and not isinstance(literal, bool):
            kind = "int" if isinstance(literal, int) else "json"
        else:
            kind = "python"
        return f"for the {type(parse(text, kind, is_key=True)).__name__} use --key-type {kind}"
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# --- keys and values ------------------------------------------------------------------------------------------------
def show_key(key: object) -> str:
    """A key on one line: a str as it is unless it has unprintable characters, anything else as Python writes it."""
    return key if isinstance(key, str) and key.isprintable() else repr(key)


def show_value(value: object) -> str:
    """A value for people: a str as it is, anything else as Python writes it."""
    if isinstance(value, str):
        return value
    from pprint import pformat

    return pformat(value, width=100, sort_dicts=False)


def as_json(value: object) -> str:
    """One line of JSON for any value, with the substitutions that `shmcache --help` lists."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _json_name(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value, key=repr)]
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    return str(value)


def _json_name(key: object) -> str:
    """The key of a dict as the name of a member of an object: as JavaScript would, or as Python writes it."""
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    return repr(key)


# --- figures --------------------------------------------------------------------------------------------------------
def show_size(size: float) -> str:
    """Bytes in the largest fitting unit of 1,024: "64.0 MiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.1f} TiB"


def show_age(seconds: float) -> str:
    """A span of time in its two largest units: "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        number, left = divmod(left, length)
        if number or parts:
            parts.append(f"{number} {unit}" if number else "")
    return " ".join(part for part in parts[:2] if part)


def show_ratio(hits: float, misses: float) -> str:
    """The share of hits: "93.1 %", or "-" if nothing was read."""
    return f"{100 * hits / (hits + misses):.1f} %" if hits + misses else "-"


_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """Lines of aligned columns; `align` has a "<" or ">" for each. Colours take no width."""
    lines = [header, *rows]
    widths = [max(len(_ESCAPE.sub("", line[column])) for line in lines) for column in range(len(align))]
    return ["  ".join(map(_pad, line, widths, align)).rstrip() for line in lines]


def _pad(cell: str, width: int, side: str) -> str:
    space = " " * (width - len(_ESCAPE.sub("", cell)))
    return cell + space if side == "<" else space + cell
