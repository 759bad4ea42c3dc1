"""What a shell sees of the `shmcache` command when something goes wrong: one line on stderr, and an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

import click

from shmcache.errors import ShmcacheError

__all__ = ["main"]

INTERRUPTED = 128 + 2  # what a shell reports of a process that SIGINT ended
PIPE_CLOSED = 128 + 13  # and SIGPIPE


class Commands(click.Group):
    """The group of all commands: it lists them as they were added, and turns exceptions into exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a locale need not have every character of a value
        try:
            try:
                return super().invoke(ctx)
            except click.NoSuchOption as error:
                said = f"{error.message} (A key or value that begins with a dash goes behind `--`.)"
                raise click.NoSuchOption(error.option_name, said, error.possibilities, error.ctx) from None
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Python flushes once more at its exit; let that go nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        except (ShmcacheError, OSError) as error:
            raise click.ClickException(str(error)) from error


def main() -> None:
    """Run the command that the arguments of this process name."""
    from shmcache.cli.commands import shmcache

    shmcache.main(prog_name="shmcache")
