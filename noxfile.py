"""Every check of the project: `nox` runs them all, `nox --list` names them, `nox -s lint types` runs two.

The tests run once compiled and once from the sources, on every supported Python that this machine has. What is not
there is reported as skipped, by name; in continuous integration (CI is set) a missing C compiler is an error instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nox

PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# Most tests wait for processes of their own: a test process for each core takes little more than half the time.
SPREAD = ("--numprocesses=logical", "--maxprocesses=4", "--dist=worksteal")

# A build or a test is told its mode here and by nobody else.
for variable in ("SHMCACHE_PURE", "SHMCACHE_REQUIRE_EXTENSION", "SHMCACHE_SANITIZE"):
    os.environ.pop(variable, None)

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False

# What `sanitize` does not run: parts that see nothing of the extension, and what a process many times slower fails.
NOT_SANITIZED = (
    "test_torture.py::test_short[faults]",
    "test_torture.py::test_short[double_deaths]",
    "test_torture.py::test_short[lock_model]",
    "test_torture.py::test_short[kills]",
    "test_benchmarks.py::test_an_operation_takes_no_more_instructions_than_its_budget",
    "test_kills.py::test_a_killed_holder_is_succeeded_at_once",
)

SMOKE = """
import os, shmcache
compiled = os.environ["EXPECT"] == "compiled"
assert shmcache.is_compiled() is compiled, shmcache.__file__
with shmcache.Cache(f"smoke-{os.getpid()}", max_bytes="4MB") as cache:
    try:
        cache.set("key", {"of": ("any", "kind")})
        assert cache.get("key") == {"of": ("any", "kind")}
        assert cache.check() == []
    finally:
        cache.unlink()
print(shmcache.__version__, "works,", os.environ["EXPECT"])
"""


# --- the machine ----------------------------------------------------------------------------------------------------
def runs(python: str | Path, version: str) -> bool:
    """Whether this interpreter starts and is of this version. (A pyenv shim may exist and do neither.)"""
    try:
        answer = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
        )
    except OSError:
        return False
    return answer.returncode == 0 and answer.stdout.strip() == version


def interpreters(version: str) -> Iterator[Path]:
    """Where a Python of this version may be that PATH does not lead to."""
    name = f"python{version}"
    yield Path(sys.base_prefix, "bin", name)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/{name}"), reverse=True)
    if uv := shutil.which("uv"):
        found = subprocess.run(
            [uv, "python", "find", "--no-python-downloads", version], capture_output=True, text=True
        ).stdout.strip()
        if found:
            yield Path(found).resolve().with_name(name)


def put_on_path(versions: tuple[str, ...]) -> None:
    """Make `pythonX.Y` a command that works for every version that is anywhere on this machine."""
    for version in versions:
        if (command := shutil.which(f"python{version}")) and runs(command, version):
            continue
        for python in interpreters(version):
            if runs(python, version):
                os.environ["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])
                break


put_on_path(PYTHONS)


def missing_for_compiling(session: nox.Session) -> str | None:
    """What this session's Python lacks for building C extensions, or None."""
    if not shutil.which(os.environ.get("CC") or "cc") and not shutil.which("gcc"):
        return "a C compiler (Debian: apt-get install gcc)"
    find_headers = "import sysconfig; print(sysconfig.get_path('include'))"
    include = str(session.run("python", "-c", find_headers, silent=True)).strip()
    if not Path(include, "Python.h").exists():
        return "Python's headers (Debian: apt-get install python3-dev)"
    return None


def need_compiler(session: nox.Session) -> None:
    """Skip the session where nothing can be compiled; in continuous integration, fail it."""
    if missing := missing_for_compiling(session):
        (session.error if "CI" in os.environ else session.skip)(f"needs {missing}")


def tools(*names: str) -> list[str]:
    """The requirements of these development tools, as pyproject.toml states them."""
    dev = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
    return [requirement for requirement in dev if requirement.partition(">")[0] in names]


def smoke(session: nox.Session, mode: str, **env: str) -> None:
    """Use the installed package from elsewhere: here, Python would import the sources in the working directory."""
    with session.chdir(session.create_tmp()):
        session.log(f"Trying a cache, {mode}, in {Path.cwd()}")
        session.run("python", "-c", SMOKE, env={"EXPECT": mode, **env}, log=False)


def copy_of_sources(session: nox.Session) -> Path:
    """A fresh copy, without what was built."""
    copy = Path(session.create_tmp(), "clone").resolve()
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info"))
    return copy


# --- the sessions ---------------------------------------------------------------------------------------------------
@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install(*tools("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install(
        "-e", ".[test]", *tools("mypy", "nox", "types-cachetools", "types-psutil"), env={"SHMCACHE_PURE": "1"}
    )
    session.run("mypy")


@nox.session(python=PYTHONS)
@nox.parametrize("mode", ["compiled", "pure"])
def tests(session: nox.Session, mode: str) -> None:
    """The test suite. Arguments after `--` go to pytest."""
    extras = "test,uwsgi"
    if mode == "compiled":
        need_compiler(session)
        env = {"SHMCACHE_REQUIRE_EXTENSION": "1"}
    else:
        if missing_for_compiling(session):
            extras = "test"
        env = {"SHMCACHE_PURE": "1"}
    # Editable, so that no child process of a test can import anything but what is tested, wherever it starts.
    session.install("-e", f".[{extras}]", env=env)
    is_mode = f"import shmcache; assert shmcache.is_compiled() is {mode == 'compiled'}"
    session.run("python", "-c", is_mode, env=env)
    # Pythons of other sessions that have the package, in the same mode: all of them shall meet on one cache.
    others = Path(session.virtualenv.location).parent.glob(f"tests-*-mode-{mode}/bin/python")
    env["SHMCACHE_OTHER_PYTHONS"] = os.pathsep.join(
        sorted(str(python) for python in others if session.virtualenv.location not in str(python))
    )
    # These run on the sources whatever is installed: the other mode has them.
    elsewhere = ["faults", "double_deaths"] if mode == "compiled" else []
    if session.python != PYTHONS[0]:
        elsewhere.append("lock_model")  # it knows no Python
    repeated = [f"--deselect=tests/test_torture.py::test_short[{part}]" for part in elsewhere]
    session.run("pytest", *SPREAD, *repeated, *session.posargs, env=env)


COVERING = (
    "attachment",
    "contract",
    "distrust",
    "errors",
    "expiry",
    "faults",
    "journal",
    "keys",
    "lock",
    "message",
    "repair",
)
# Other shapes of the cache come by the same lines, and these tests take long when each line is counted.
NOT_COVERING = ("many_shards", "tiny", "large", "odd_size", "tenth_of_the_entries", "many_small_writes")


@nox.session(python=PYTHONS[0])
def coverage(session: nox.Session) -> None:
    """Every line and branch of the engine's sources is run by a chosen part of the tests, or says why not.

    Without Cython, so that what stands in for it is run, too. Arguments after `--` go to pytest.
    """
    session.install("-e", ".[test]", *tools("coverage"), env={"SHMCACHE_PURE": "1"})
    env = {"SHMCACHE_PURE": "1", "COVERAGE_FILE": str(Path(session.create_tmp(), "coverage").resolve())}
    session.run("coverage", "erase", env=env)
    files = [f"tests/test_{name}.py" for name in COVERING]
    chosen = " and ".join(f"not {name}" for name in NOT_COVERING)
    session.run("coverage", "run", "-m", "pytest", *SPREAD, "-k", chosen, *files, *session.posargs, env=env)
    session.run("coverage", "combine", "--quiet", env=env)
    session.run("coverage", "report", "--include=shmcache/engine/*", "--fail-under=100", env=env)


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """The tests of lock, journal, table and repair notice nearly every change of these; a quarter of an hour.

    Arguments after `--` go to it: `--help` says more.
    """
    session.install("-e", ".[test]", *tools("mutmut"), env={"SHMCACHE_PURE": "1"})
    session.run("python", "-m", "tests.mutation", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Tests with the engine built for AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources.

    Without arguments those of the contract and of lies in the segment. Arguments after `--` go to pytest:
    `nox -s sanitize -- tests` runs all that can run so.
    """
    need_compiler(session)
    compiler = os.environ.get("CC") or "gcc"
    libraries = []
    for library in ("libasan.so", "libubsan.so"):
        found = str(session.run(compiler, f"-print-file-name={library}", silent=True, external=True)).strip()
        if not Path(found).is_absolute():
            session.skip(f"needs {library} of {compiler}")
        libraries.append(found)
    # A copy, for its extensions are to be used by nobody else, and those of others not to be taken for its own.
    copy = copy_of_sources(session)
    env = {
        "LD_PRELOAD": ":".join(libraries),  # Python itself is not built so, and it must be there before the extensions
        # Python keeps memory until its end on purpose. And what is freed is to be kept back for a while, not for ever.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # every object by itself, so that what lies beside one is known to be forbidden
    }
    with session.chdir(copy):
        session.install("-e", ".[test]", env={"SHMCACHE_REQUIRE_EXTENSION": "1", "SHMCACHE_SANITIZE": "1"})
        is_so = "import shmcache.engine.store as it; assert b'__asan_init' in open(it.__file__, 'rb').read()"
        session.run("python", "-c", is_so, env=env)
        short = ["tests/test_contract.py", "tests/test_hostile.py", "tests/test_torture.py::test_short[hostile]"]
        left_out = [f"--deselect=tests/{test}" for test in NOT_SANITIZED]
        session.run("pytest", *SPREAD, *left_out, *(session.posargs or short), env=env)


@nox.session
def torture(session: nox.Session) -> None:
    """The torture suite: by default a death before every store, of which the tests try some.

    Arguments after `--` go to it: `nox -s torture -- --for 60` runs all of it for an hour.
    """
    need_compiler(session)
    session.install("-e", ".[test]", env={"SHMCACHE_REQUIRE_EXTENSION": "1"})
    session.run(
        "python", "-m", "tests.torture", *(session.posargs or ["--only", "faults", "--for", "4", "--no-progress"])
    )


@nox.session
def no_compiler(session: nox.Session) -> None:
    """An install on a machine without a compiler works, and says that it is slow."""
    no_cc = str(shutil.which("false"))
    output = session.run("python", "-m", "pip", "install", "--verbose", ".", env={"CC": no_cc}, silent=True)
    if "This build of shmcache is NOT compiled" not in str(output):
        session.error("the build did not warn that it is not compiled")
    smoke(session, "pure")

    session.log("Now the extension is required, so the same build has to fail")
    required = {"CC": no_cc, "SHMCACHE_REQUIRE_EXTENSION": "1"}
    output = session.run("python", "-m", "pip", "install", ".", env=required, success_codes=[1], silent=True)
    if no_cc not in str(output):
        session.error(f"the build failed, but not for want of a compiler:\n{output}")


@nox.session
def package(session: nox.Session) -> None:
    """The archives hold what they should, and an install from them works in both modes."""
    need_compiler(session)
    session.install("build")
    dist = Path(session.create_tmp(), "dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), env={"SHMCACHE_REQUIRE_EXTENSION": "1"})
    [sdist] = dist.glob("*.tar.gz")
    [wheel] = dist.glob("*.whl")

    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if name.startswith("shmcache/")}
    sources = {
        str(path) for path in Path("shmcache").rglob("*") if path.suffix in (".py", ".pxd") or path.name == "py.typed"
    }
    models = {str(path) for path in Path("shmcache").rglob("*.pml")}  # to be read and checked, not to be installed
    for name, files, needed in ((sdist.name, packed, sources | models), (wheel.name, installed, sources)):
        if lacking := needed - files:
            session.error(f"{name} lacks {', '.join(sorted(lacking))}")
    if built := [name for name in packed if name.endswith((".c", ".so"))]:
        session.error(f"{sdist.name} holds what a build made: {', '.join(built)}")
    extra = {name for name in installed - sources if not name.endswith(".so")}
    if extra:
        session.error(f"{wheel.name} holds more than the package: {', '.join(sorted(extra))}")

    session.install(str(wheel))
    smoke(session, "compiled")
    smoke(session, "pure", SHMCACHE_PURE="1")

    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), env={"SHMCACHE_PURE": "1"})
    if not list(dist.glob("*-py3-none-any.whl")):
        session.error("a build without extensions is not a wheel for every platform")


@nox.session
def readme(session: nox.Session) -> None:
    """The command of the README that runs the demo, in a fresh copy of the sources."""
    [command] = [line for line in Path("README.md").read_text().splitlines() if line.endswith("shmcache demo")]
    copy = copy_of_sources(session)
    with session.chdir(copy):
        session.run("bash", "-euc", command, external=True)
