"""The engine: everything that reads or writes an entry of the shared segment lives in this package, and all that is
compiled. (The header is written by `segment.py`, and figures are read by `stats.py`, with its raw operations.)

`SHMCACHE_PURE=1` in the environment makes Python run the sources even where compiled modules lie beside them. Only the
main interpreter of a process gets either: two would take each other's places in the process table, since what the
kernel locks belongs to the process, and compiled code would wait for the wrong thread state.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__: list[str] = []


class _Sources:
    """Finds the `.py` of an engine module, where the ordinary finder would prefer its `.so`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, leaf = fullname.rpartition(".")
        if package != __name__:
            return None
        from importlib.util import spec_from_file_location  # seldom

        return spec_from_file_location(fullname, os.path.join(os.path.dirname(__file__), f"{leaf}.py"))


def _is_main_interpreter() -> bool:
    """Whether this is no sub-interpreter, as mod_wsgi makes them; no public function of Python before 3.14 tells."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    try:
        interpreters: Any = importlib.import_module(name)
    except ImportError:
        return True  # a Python without them
    return bool(interpreters.get_current() == interpreters.get_main())


if not _is_main_interpreter():
    raise ImportError(
        "shmcache works in the main interpreter of a process only, and this is a sub-interpreter: with mod_wsgi, set "
        "`WSGIApplicationGroup %{GLOBAL}`"
    )

if os.environ.get("SHMCACHE_PURE", "") not in ("", "0"):
    sys.meta_path.insert(0, _Sources())
