"""Real processes for the tests: forked children, and interpreters of their own that do what they are told by a pipe.

A `Family` kills whatever of it is left at its end, so that a failing test leaves no process behind. Everything that
waits has a deadline.
"""

from __future__ import annotations

import ast
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import shmcache
from shmcache import segment

DEADLINE = 30.0  # seconds until a test stops waiting for a process; none comes near it


def environment(**more: str) -> dict[str, str]:
    """For a child interpreter: the engine of the same kind as here, whatever made it so."""
    return {**os.environ, "SHMCACHE_PURE": "" if shmcache.is_compiled() else "1", **more}


def until(condition: Callable[[], object], seconds: float = DEADLINE) -> float:
    """Look again and again until it holds; how long that took. For what only the kernel or a process can change."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not so after {seconds} s: {condition}")
        time.sleep(0.001)
    return time.monotonic() - began


class Gate:
    """A starting gate: whoever waits goes on when it opens, all at the same moment."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def wait(self) -> None:
        """In a child: wait until the parent opens the gate."""
        os.close(self._write)
        ready, _, _ = select.select([self._read], [], [], DEADLINE)
        assert ready, "the gate was never opened"

    def open(self) -> None:
        os.close(self._write)
        os.close(self._read)

    close = open  # where another process is to open it


def files(name: str) -> list[str]:
    """The files of a cache, whatever kind."""
    return sorted(path.name for path in Path(segment.DIRECTORY).glob(f"*{name}*"))


def read(fd: int, size: int = 1) -> bytes:
    """Read from a pipe that children write to."""
    ready, _, _ = select.select([fd], [], [], DEADLINE)
    assert ready, "no child wrote"
    return os.read(fd, size)


class Child:
    """A forked child that runs one function and leaves by `os._exit`: 0, or 1 with a traceback if it raised."""

    def __init__(self, work: Callable[..., object], *args: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                work(*args)
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())  # sys.stderr may be something in memory
            finally:
                os._exit(code)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL; its exit code, which is -9 unless it was through already."""
        if self.status is None:
            self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = DEADLINE) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        if self.status is None:
            ended = os.pidfd_open(self.pid)
            try:
                ready, _, _ = select.select([ended], [], [], seconds)
            finally:
                os.close(ended)
            assert ready, f"process {self.pid} still runs after {seconds} s"
            self.reap()
        assert self.status is not None
        return self.status

    def poll(self) -> None:
        """Fail if it has ended, which is not expected yet."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
            raise AssertionError(f"process {self.pid} ended by itself with status {self.status}")

    def reap(self) -> None:
        """Wait without a deadline, for what is certain to have ended or to end."""
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)

    def wait_until_stopped(self) -> None:
        """Wait until SIGSTOP has stopped it."""
        assert self.has_stopped(), self.status

    def has_stopped(self) -> bool:
        """Wait until it has been stopped, by a signal or its tracer, or has ended; whether it was stopped."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.status = os.waitstatus_to_exitcode(status)
        return self.status is None


_OBEY = """
import sys
from shmcache import *
while line := sys.stdin.readline():
    try:
        answer = repr(eval(line))
    except Exception as error:
        answer = repr(f"{type(error).__name__}: {error}")
    sys.stdout.write(answer + "\\n")
    sys.stdout.flush()
"""


class Interpreter:
    """A Python process of its own, unrelated to this one, that evaluates expressions until its input ends.

    Every warning is an error in it, and what it writes to stderr is kept for the test to look at.
    """

    def __init__(self, python: str = sys.executable, **env: str) -> None:
        self._unread = b""
        self.process = subprocess.Popen(
            [python, "-W", "error", "-c", _OBEY],
            cwd="/",  # where nothing but an installed shmcache is found
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**env),
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, expression: str) -> None:
        """Have it evaluate an expression, without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The value of the oldest expression not answered yet: as itself if it is a literal, otherwise its repr."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], DEADLINE)
            assert ready, f"process {self.pid} does not answer"
            more = os.read(pipe, 1 << 16)
            assert more, f"process {self.pid} ended: {self.finish()}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        text = line.decode()
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text

    def ask(self, expression: str) -> Any:
        self.tell(expression)
        return self.answer()

    def finish(self) -> tuple[int, str]:
        """Let it end as programs do; its exit code and what it wrote to stderr."""
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        except BrokenPipeError:  # it was killed before
            _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors

    def kill(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        self.process.send_signal(number)
        return self.finish()


class Family:
    """The processes of a test. At the end of its `with` block none is left."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._interpreters: list[Interpreter] = []

    def fork(self, work: Callable[..., object], *args: object) -> Child:
        child = Child(work, *args)
        self._children.append(child)
        return child

    def python(self, python: str = sys.executable, **env: str) -> Interpreter:
        interpreter = Interpreter(python, **env)
        self._interpreters.append(interpreter)
        return interpreter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            if child.status is None:
                child.signal(signal.SIGKILL)
                child.reap()
        for interpreter in self._interpreters:
            if interpreter.process.returncode is None:
                interpreter.process.kill()
            with contextlib.suppress(BrokenPipeError, ValueError):
                interpreter.process.communicate()
            for stream in (interpreter.process.stdin, interpreter.process.stdout, interpreter.process.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


# --- ways to leave ----------------------------------------------------------------------------------------------------
def leave_by_end(process: Interpreter) -> None:
    assert process.finish() == (0, "")


def leave_by_close(process: Interpreter) -> None:
    process.ask("c.close()")
    assert process.finish() == (0, "")


def leave_by_os_exit(process: Interpreter) -> None:
    process.tell("__import__('os')._exit(0)")
    assert process.finish() == (0, "")


def leave_by_sys_exit(process: Interpreter) -> None:
    process.tell("sys.exit(3)")
    assert process.finish() == (3, "")


def leave_by_sigterm(process: Interpreter) -> None:
    assert process.kill(signal.SIGTERM) == (-signal.SIGTERM, "")


def leave_by_sigkill(process: Interpreter) -> None:
    assert process.kill() == (-signal.SIGKILL, "")


WAYS_TO_LEAVE = [leave_by_end, leave_by_close, leave_by_os_exit, leave_by_sys_exit, leave_by_sigterm, leave_by_sigkill]


# --- programs ---------------------------------------------------------------------------------------------------------
def run_python(code: str, *args: str, **env: str) -> str:
    """Run a program to its end; what it printed. Every warning is an error, and stderr has to stay empty."""
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Freeze what is there, so that forked children do not copy the memory of the whole test run."""
    import gc

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# --- a /dev/shm of its own ------------------------------------------------------------------------------------------
_NEWNS, _NEWUSER, _PRIVATE = 0x0002_0000, 0x1000_0000, 0x4_4000  # of <sched.h>; MS_REC | MS_PRIVATE of <sys/mount.h>

_OUTSIDE = os.readlink("/proc/self/ns/mnt")


def mount_shared_memory(options: str, flags: int = 0) -> None:
    """Mount a new tmpfs over the /dev/shm of this process, which must be a child made for it: nobody else sees that."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    if os.readlink("/proc/self/ns/mnt") == _OUTSIDE:
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", _NEWNS if uid == 0 else _NEWNS | _NEWUSER)
        if uid:
            for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{file}", "w") as stream:
                    stream.write(text)
        call("mount", b"none", b"/", None, _PRIVATE, None)
    call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", flags, f"mode=1777,{options}".encode())


def cannot_mount() -> str | None:
    """Why there can be no /dev/shm of one's own here."""

    def attempt() -> None:
        with contextlib.suppress(OSError):
            mount_shared_memory("size=1m")
            os._exit(42)

    return None if Child(attempt).wait() == 42 else "this user cannot mount a /dev/shm of its own"
