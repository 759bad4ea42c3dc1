"""What an install consists of: the compiled modules, the version, the files, and the command that tests it all.

Builds are slow, so they are tested by nox (sessions `no_compiler` and `package`), not here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import shmcache

ROOT = Path(__file__).parent.parent
PACKAGE = Path(shmcache.__file__).parent

# Their C side is all in the .pxd, so there is nothing to compile.
NOT_COMPILED = {"layout", "primitives"}


def compiled_modules() -> tuple[str, ...]:
    """The list in setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="COMPILED")], value=value):
                names: tuple[str, ...] = ast.literal_eval(value)
                return names
    raise AssertionError("setup.py has no COMPILED")


def run_python(code: str, **env: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_the_list_of_compiled_modules_is_complete() -> None:
    engine = ROOT / "shmcache" / "engine"
    with_pxd = {path.stem for path in engine.glob("*.py") if path.with_suffix(".pxd").exists()}
    assert sorted(compiled_modules()) == sorted(with_pxd - NOT_COMPILED)


@pytest.mark.parametrize("name", compiled_modules())
def test_the_engine_is_compiled_whole_or_not_at_all(name: str) -> None:
    origin = importlib.import_module(f"shmcache.engine.{name}").__file__ or ""
    assert origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)) is shmcache.is_compiled()


def test_the_sources_can_be_forced() -> None:
    assert run_python("import shmcache; print(shmcache.is_compiled())", SHMCACHE_PURE="1") == "False"


NOT_NEEDED = (
    "click dataclasses decimal fractions hashlib inspect json logging numpy pickle psutil random secrets subprocess "
    "tempfile uuid zoneinfo shmcache.extensions shmcache.memoize shmcache.reaper shmcache.stats"
)
"""Modules that take longer to import than attaching to a cache takes, each imported when it is needed."""


def test_what_setting_and_getting_does_not_need_is_not_imported(name: str) -> None:
    """In a Python without `site`, because what an install puts there imports what it likes."""
    code = f"""
        import sys
        sys.path[:] = {sys.path!r}
        from shmcache import Cache
        with Cache({name!r}, max_bytes="1.5MB", max_entries=100, default_ttl=60) as cache:
            cache.set("key", ["value", 1])
            assert cache.get("key") == ["value", 1]
            assert cache.check() == []
            cache.unlink()
        print(*sys.modules)
    """
    answer = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        env={**os.environ, "SHMCACHE_PURE": "" if shmcache.is_compiled() else "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    assert {*NOT_NEEDED.split()} & {*answer.stdout.split()} == set()


def test_the_public_names_are_found_whenever_their_modules_are_imported() -> None:
    code = "import shmcache; print({*shmcache.__all__} - {*dir(shmcache)}, {*shmcache._LATER} & {*vars(shmcache)})"
    assert run_python(code) == "set() set()"
    for name in shmcache.__all__:
        assert getattr(shmcache, name) is not None
        assert name in vars(shmcache)
    with pytest.raises(AttributeError, match="module 'shmcache' has no attribute 'Cahce'"):
        getattr(shmcache, "Cahce")  # noqa: B009 - mypy knows that there is none


@pytest.mark.parametrize("pure", ["", "1"], ids=["default", "pure"])
def test_cython_is_not_needed_at_run_time(pure: str) -> None:
    without_cython = "import sys; sys.modules['cython'] = sys.modules['Cython'] = None; import shmcache; shmcache.Cache"
    run_python(without_cython, SHMCACHE_PURE=pure)


def test_the_version_is_that_of_the_metadata() -> None:
    try:
        installed = importlib.metadata.version("shmcache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("shmcache runs from its sources, not installed")
    assert shmcache.__version__ == installed


def test_the_changelog_begins_with_this_version() -> None:
    released = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == shmcache.__version__


def test_sources_and_type_marker_are_installed() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in compiled_modules():
        assert (PACKAGE / "engine" / f"{name}.py").exists()
        assert (PACKAGE / "engine" / f"{name}.pxd").exists()


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    [command] = re.findall(r"^test_all\(\) \{\n    (.+)\n\}$", script.read_text(), re.MULTILINE)
    assert command in (ROOT / "README.md").read_text().splitlines()
