"""Builds the compiled engine, and decides what happens when it cannot be built. All else is in pyproject.toml.

The engine is compiled whole or not at all: a mix of compiled and uncompiled modules would not work together.

    (default)                       compile; when that fails, warn and build without extensions
    SHMCACHE_REQUIRE_EXTENSION=1    compile; a failure is an error, so that a slow build cannot be published
    SHMCACHE_PURE=1                 build without extensions
    SHMCACHE_SANITIZE=1             compile with AddressSanitizer and UndefinedBehaviorSanitizer, for `nox -s sanitize`

`python setup.py build_ext --inplace` asks for the extensions by name, so there a failure is always an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# Every module that is compiled. tests/test_install.py checks that none is missing. (`layout` and `primitives` have a
# .pxd but no extension: their C side is all in the .pxd.)
COMPILED = (
    "lock",
    "blocks",
    "table",
    "eviction",
    "expiry",
    "journal",
    "keys",
    "memo",
    "reader",
    "shard",
    "store",
    "repair",
    "membership",
    "message",
    "request",
)

# -fno-strict-aliasing: the engine reads the same memory as words and as bytes.
# -g0: many Pythons were built with -g and pass it on; debug information would be most of every wheel.
COMPILE_ARGS = ["-O3", "-fno-strict-aliasing", "-g0"]

# The first thing that is wrong ends the process. Debug information, for there the report says where.
SANITIZE_ARGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

DIRECTIVES = {
    "annotation_typing": True,
    "boundscheck": False,
    "cdivision": True,
    "embedsignature": True,
    "initializedcheck": False,
    "language_level": 3,
    "wraparound": False,
}

# Relative to this file's directory, which is the working directory of every build.
ENGINE = Path("shmcache", "engine")


class BuildEngine(build_ext):
    """Compiles all of the engine, and after a failure leaves none of it behind."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def run(self) -> None:
        asked_by_name = self.inplace and not self.editable_mode
        places = [Path(self.build_lib, ENGINE)]
        if self.inplace:
            places.append(ENGINE)
        self.remove_extensions(places, keep=COMPILED)
        try:
            self.translate()
            super().run()
        except Exception as error:
            self.remove_extensions(places)
            if asked_by_name or switched_on("SHMCACHE_REQUIRE_EXTENSION"):
                raise
            self.go_without(error)

    def go_without(self, reason: Exception) -> None:
        """Let the build proceed as if there were no extensions, to a wheel for every platform."""
        self.extensions = []
        self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel:
            wheel.root_is_pure = True
        rule = "*" * 78
        print(
            "",
            rule,
            "WARNING: the engine of shmcache could not be compiled:",
            f"    {type(reason).__name__}: {reason}",
            "This build of shmcache is NOT compiled: it works, but many times slower.",
            "Install a C compiler and Python's headers (Debian: gcc python3-dev) and build",
            "again, or set SHMCACHE_REQUIRE_EXTENSION=1 to make this an error.",
            rule,
            "",
            sep="\n",
            file=sys.stderr,
            flush=True,
        )

    def translate(self) -> None:
        """Turn every module into C, where it, a `.pxd` or this file changed since it was last done."""
        from Cython.Build import cythonize

        # One module inlines what another's .pxd declares, so a change of any .pxd is a change of every module.
        common = [*map(str, sorted(ENGINE.glob("*.pxd"))), "setup.py"]
        for extension in self.extensions:
            source = Path(extension.sources[0])
            target = Path(self.build_temp, source).with_suffix(".c")
            extension.depends = common
            [translated] = cythonize(
                Extension(extension.name, [str(source)]),
                build_dir=self.build_temp,
                compiler_directives=DIRECTIVES,
                force=self.force or newer_group([str(source), *common], str(target)),
            )
            extension.sources = translated.sources

    def remove_extensions(self, places: list[Path], keep: tuple[str, ...] = ()) -> None:
        """Remove what earlier builds for this Python left: Python would prefer it to the sources."""
        kept = {Path(self.get_ext_filename(name)).name for name in keep}
        for place in places:
            for built in place.glob(f"*{self.get_ext_filename('')}"):
                if built.name not in kept:
                    built.unlink()


def switched_on(variable: str) -> bool:
    """Whether an environment variable is set to anything but nothing or 0."""
    return os.environ.get(variable, "") not in ("", "0")


if switched_on("SHMCACHE_PURE") and switched_on("SHMCACHE_REQUIRE_EXTENSION"):
    sys.exit("error: SHMCACHE_PURE and SHMCACHE_REQUIRE_EXTENSION contradict each other: unset one of them")

sanitize_args = SANITIZE_ARGS if switched_on("SHMCACHE_SANITIZE") else []

setup(
    cmdclass={"build_ext": BuildEngine},
    ext_modules=[
        Extension(
            f"shmcache.engine.{name}",
            [str(ENGINE / f"{name}.py")],
            extra_compile_args=[*COMPILE_ARGS, *sanitize_args],
            extra_link_args=sanitize_args,
        )
        for name in (() if switched_on("SHMCACHE_PURE") else COMPILED)
    ],
)
