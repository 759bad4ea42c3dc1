"""Whether the tests notice when the lock, the journal, the table or the repair are changed: `nox -s mutation`.

mutmut changes these files in one place after the other and runs, each time, the tests that come by that place. What
this module adds: the run happens in a copy of the tree, in namespaces of its own where the machine has them, so that
processes and segments of mutants that hang go with it; and survivors are told from mutants that do what the original
does, which `mutants.toml` lists with the reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MUTATED = [f"shmcache/engine/{name}.py" for name in ("lock", "journal", "table", "repair")]
TESTS = [f"tests/test_{name}.py" for name in ("lock", "journal", "repair")]
GOAL = 95.0  # percent of the mutants that are no equivalents
KILLED, SURVIVED, TIMEOUT = 1, 0, -24  # mutmut's exit codes; SIGXCPU is its timeout

CONFIGURATION = f"""
[tool.mutmut]
source_paths = ["shmcache"]
only_mutate = {MUTATED}
also_copy = ["README.md", "docs"]
pytest_add_cli_args_test_selection = {TESTS}
pytest_add_cli_args = ["-p", "no:cacheprovider"]
"""

# A /dev/shm and a process table of its own. The shell stays, as process 1, for orphans: mutmut knows none of them.
APART = [
    "unshare",
    *(["--map-root-user"] if os.geteuid() else []),
    "--mount",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child",
    "sh",
    "-c",
]
OWN_SHM = 'mount -t tmpfs tmpfs /dev/shm && "$@"; exit $?'


def copy_tree(to: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    with (to / "pyproject.toml").open("a") as file:
        file.write(CONFIGURATION)
    (to / "mutants").mkdir()  # where mutmut will put them; Python never finds a directory that it has once missed


def run(tree: Path, children: int) -> None:
    """Run mutmut, which shows its progress."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children)]
    if shutil.which("unshare") and not subprocess.run([*APART, OWN_SHM, "sh", "true"], capture_output=True).returncode:
        command = [*APART, OWN_SHM, "sh", *command]
    else:
        print("no namespaces can be had here: mutants that hang may leave processes, and files in /dev/shm")
    # Children of tests find the package by PYTHONPATH; -B: no byte code of one mutant for the next.
    env = {**os.environ, "SHMCACHE_PURE": "1", "PYTHONPATH": str(tree / "mutants"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=tree, env=env, check=True)


def outcomes(tree: Path) -> dict[str, int]:
    """What became of each mutant, by the name that mutmut gave it."""
    found: dict[str, int] = {}
    for name in MUTATED:
        found |= json.loads((tree / "mutants" / f"{name}.meta").read_text())["exit_code_by_key"]
    return found


def function_of(mutant: str) -> str:
    """`Lock.wait` of `shmcache.engine.lock.xǁLockǁwait__mutmut_1`."""
    return re.sub(r"^xǁ|^x_", "", mutant.rpartition(".")[2]).partition("__mutmut_")[0].replace("ǁ", ".")


def changed_line(tree: Path, mutant: str) -> str:
    """The line that a mutant has instead of the original's."""
    shown = subprocess.run(
        [sys.executable, "-m", "mutmut", "show", mutant], cwd=tree, capture_output=True, text=True, check=True
    ).stdout
    lines = [line[1:].strip() for line in shown.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return " ".join(lines)


def why_equivalent(entries: list[dict[str, Any]], function: str, line: str) -> str | None:
    for entry in entries:
        if not function.startswith(entry.get("within", "")):
            continue
        if line in entry.get("lines", ()) or ("pattern" in entry and re.search(entry["pattern"], line)):
            return str(entry["why"])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-children", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    options = parser.parse_args()
    entries = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["equivalent"]
    with tempfile.TemporaryDirectory(prefix="shmcache-mutants-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        run(tree, options.max_children)
        results = outcomes(tree)
        survivors = {name: changed_line(tree, name) for name, code in sorted(results.items()) if code == SURVIVED}
    alike = {name for name, line in survivors.items() if why_equivalent(entries, function_of(name), line)}
    for name, line in survivors.items():
        if name not in alike:
            print(f"survived: {name}\n    {line}")
    counts = Counter(results.values())
    killed = len(results) - len(survivors)
    share = 100 * killed / (len(results) - len(alike))
    print(
        f"{len(results)} mutants: {counts[KILLED]} killed by a failing test, {counts[TIMEOUT]} by a timeout, "
        f"{killed - counts[KILLED] - counts[TIMEOUT]} otherwise; {len(survivors)} survived, {len(alike)} of them "
        f"equivalent: {100 * killed / len(results):.1f} % killed of all, {share:.1f} % of those that are not equivalent"
    )
    return share < GOAL


if __name__ == "__main__":
    sys.exit(main())
