"""Every code block of README.md and docs/ is run, or where this machine cannot run it, parsed.

What is done with a block is in its info string, and an unknown one is an error, so that none is skipped in silence:

    pycon               prompts and output; the output is compared (`...` stands for anything)
    python              statements; they run in the same namespace, in the order of the file
    python file=NAME    saved as NAME, for the commands below it
    console             `$` commands and their output, compared likewise
    sh                  commands, which must succeed
    sh setup            the commands that set up all there is: they are what continuous integration runs
    sh server           the command of a server at 127.0.0.1:8000: run at an address of the test's, and asked
    sh elsewhere        commands for another machine: parsed
    yaml, dockerfile    parsed
    ini                 parsed, and saved if `file=NAME` follows; a unit is verified where systemd is installed
    text                not code

What needs something that is not installed is named in the reason for which the test is then reported as skipped.
All blocks of a file share a directory, and the caches that `CACHES` lists, for which names of the test's own are put.
No cache is left at the end of a file, so that readers can follow one after the other.
"""

from __future__ import annotations

import ast
import configparser
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shmcache import Cache, segment
from tests.serving import BIN, PATIENCE, ROOT, serve

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CACHES = {"README.md": ["shop"], "usage.md": ["warehouse"], "deployment.md": ["website", "trial"]}
NO_CACHES = ["no-such-cache", "default"]  # names that an example gives without opening a cache
_USE_OF_A_CACHE = re.compile(
    r"""Cache(?:\.attach)?\("([^"]*)" | \bfrom_env\(name="([^"]*)" | \bCACHE_NAME=(\S+)
      | \bshmcache\ (?:stats|keys|info|get|set|delete|check|doctor|repair|clear|unlink)\ ([\w.]+)""",
    re.VERBOSE,
)
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A code block: where it is, what its info string says, what is in it."""

    document: Path
    line: int
    info: str
    code: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: ```{self.info}\n{self.code}"


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in _FENCE.finditer(text):
        yield Block(document, text.count("\n", 0, match.start()) + 2, match["info"].strip(), match["code"])
    assert text.count("\n```") % 2 == 0, f"{document}: a code block has no end"


class Runner:
    """Runs the blocks of one document, in order."""

    def __init__(self, document: Path, name: str, directory: Path) -> None:
        self.names = dict(zip(CACHES.get(document.name, []), (name, f"{name}-2"), strict=False))
        self.name = name
        self.directory = directory
        self.not_run: list[str] = []
        self.namespace: dict[str, Any] = {"__name__": "docs"}
        venv = os.pathsep.join([str(BIN), os.environ["PATH"]])
        self.env = {**os.environ, "PATH": venv, "PYTHONWARNINGS": "error", "COLUMNS": "120"}

    def run(self, block: Block) -> None:
        what, _, argument = block.info.partition(" ")
        run = getattr(self, f"run_{what}", None)
        assert run is not None, f"no rule for a block of this kind:\n{block}"
        used = {next(filter(None, match)) for match in _USE_OF_A_CACHE.findall(block.code)}
        assert used <= {*self.names, *NO_CACHES}, (
            f"the tests must not touch a cache of yours, so name it as CACHES says:\n{block}"
        )
        code = block.code
        for name, own in self.names.items():
            code = re.sub(rf"\b{name}\b", own, code)
        run(block, code, argument)

    def run_pycon(self, block: Block, code: str, argument: str) -> None:
        assert not argument, block
        test = doctest.DocTestParser().get_doctest(code, {}, str(block.document), str(block.document), block.line - 1)
        assert test.examples, block
        test.globs = self.namespace
        report: list[str] = []
        doctest.DocTestRunner(optionflags=_OPTIONS).run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)

    def run_python(self, block: Block, code: str, argument: str) -> None:
        option, _, file = argument.partition("=")
        assert option in ("", "file"), block
        assert ">>>" not in code, f"this is pycon:\n{block}"
        tree = ast.parse(code)
        if file:
            (self.directory / file).write_text(code)
        else:
            # Lines are those of the document.
            exec(compile(ast.increment_lineno(tree, block.line - 1), block.document, "exec"), self.namespace)

    def run_console(self, block: Block, code: str, argument: str) -> None:
        assert not argument, block
        assert code.startswith("$ "), block
        for command_and_output in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
            command, _, expected = command_and_output.partition("\n")
            output = self.shell(block, command)
            assert doctest.OutputChecker().check_output(expected, output, _OPTIONS), f"{block}\ngives\n{output}"

    def run_sh(self, block: Block, code: str, argument: str) -> None:
        assert argument in ("", "setup", "server", "elsewhere"), block
        if argument == "server":
            self.run_server(block, shlex.split(code))
        elif argument:
            subprocess.run(["bash", "-n", "-c", code], check=True, timeout=PATIENCE)
        else:
            self.shell(block, code)

    def run_server(self, block: Block, command: list[str]) -> None:
        program, at = BIN / command[0], command.index("127.0.0.1:8000")
        scheme = {"gunicorn": "unix:", "uwsgi": ""}[command[0]]
        if not program.exists():
            self.not_run.append(f"line {block.line} needs {command[0]}")
            self.shell(block, "python -c 'import web'")  # what follows is about the cache that it opens
            return

        def with_address(address: str) -> list[str]:
            return [str(program), *command[1:at], scheme + address, *command[at + 1 :]]

        with serve(with_address, self.name, self.directory) as server:
            assert server.ask("/")[0] == 200, server.log
            server.wait_until_all_workers_wait()

    def shell(self, block: Block, commands: str) -> str:
        """The output of commands, which must succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.directory,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE * 2,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run_yaml(self, block: Block, code: str, argument: str) -> None:
        assert not argument, block
        try:
            import yaml  # type: ignore[import-untyped, unused-ignore]
        except ModuleNotFoundError:
            self.not_run.append(f"line {block.line} needs PyYAML")
            return
        for part in yaml.safe_load_all(code):
            assert isinstance(part, dict), block

    def run_ini(self, block: Block, code: str, argument: str) -> None:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(code)
        assert parser.sections(), block
        option, _, file = argument.partition("=")
        assert option in ("", "file"), block
        if file:
            (self.directory / file).write_text(code)
        if file.endswith(".service") and (verify := shutil.which("systemd-analyze")):
            self.verify_unit(verify, block, self.directory / file, parser["Service"]["ExecStart"].split()[0])

    def verify_unit(self, verify: str, block: Block, unit: Path, program: str) -> None:
        """A unit has nothing that systemd does not know, but for its program, which is not installed here."""
        unit.write_text(unit.read_text().replace(program, sys.executable))
        done = subprocess.run(
            [verify, "--man=no", "verify", unit], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        said = [line for line in done.stderr.splitlines() if unit.name in line]
        assert not said, f"{block}\n{done.stderr}"

    def run_dockerfile(self, block: Block, code: str, argument: str) -> None:
        instructions = re.sub(r"\\\n", " ", code).splitlines()
        known = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "CMD", "ENTRYPOINT", "EXPOSE", "ARG"}
        for instruction in instructions:
            word, _, rest = instruction.partition(" ")
            assert not word or word.startswith("#") or (word in known and rest.strip()), f"{block}\n{instruction}"

    def run_text(self, block: Block, code: str, argument: str) -> None:
        pass


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks(document: Path, name: str, tmp_path: Path) -> None:
    runner = Runner(document, name, tmp_path)
    try:
        for block in blocks(document):
            try:
                runner.run(block)
            except Exception as error:
                error.add_note(str(block))
                raise
    finally:
        for value in runner.namespace.values():
            if isinstance(value, Cache):
                value.close()
    assert not {*runner.names.values()} & {*segment.names()}, f"{document.name} leaves a cache behind"
    if runner.not_run:
        pytest.skip(f"all blocks of {document.name} were run but these: {', '.join(runner.not_run)}")


def test_the_commands_that_set_up_all_there_is_are_two() -> None:
    found = [block.code.strip() for block in blocks(ROOT / "README.md") if block.info == "sh setup"]
    demo, tests = found
    # test_install.py checks that continuous integration runs it. What it runs in turn, noxfile.py says.
    assert tests == "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox"

    venv, install, run = (shlex.split(command) for command in demo.split(" && "))
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[:3] == [".venv/bin/pip", "install", "-e"]
    extra = re.fullmatch(r"\.\[(\w+)\]", install[3])
    assert extra
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra[1] in project["optional-dependencies"]
    command = Path(run[0])
    assert command.parent == Path(".venv/bin")
    assert command.name in project["scripts"]
    helped = subprocess.run(
        [sys.executable, "-m", "shmcache", *run[1:], "--help"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert helped.returncode == 0, helped.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = _FENCE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_headings_that_are_linked_to_exist() -> None:
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", _FENCE.sub("", document.read_text())):
            text = (document.parent / target if target else document).read_text()
            anchors = {
                re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
            }
            assert anchor in anchors, f"{document.name}: {target}#{anchor}"


def test_the_timing_in_the_readme_is_what_the_example_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    [header] = re.findall(r"^\| ns per call.*$", readme, re.MULTILINE)
    timed = subprocess.run(
        [sys.executable, ROOT / "examples" / "quick_timing.py", "--rounds", "1", "--number", "100"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert re.sub(r" +", " ", header) in re.sub(r" +", " ", timed.stdout), timed.stdout + timed.stderr
