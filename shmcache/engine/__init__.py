"""The engine: everything that reads or writes a word of the shared segment lives in this package.

`SHMCACHE_PURE=1` in the environment makes Python run the sources even where compiled modules lie beside them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__all__: list[str] = []


class _Sources(MetaPathFinder):
    """Finds the `.py` of an engine module, where the ordinary finder would prefer its `.so`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, leaf = fullname.rpartition(".")
        if package != __name__:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).with_name(f"{leaf}.py"))


if os.environ.get("SHMCACHE_PURE", "") not in ("", "0"):
    sys.meta_path.insert(0, _Sources())
