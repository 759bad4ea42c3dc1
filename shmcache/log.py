"""The log of the package: `logging` is imported with the first thing that is written to it, which is seldom any."""

from __future__ import annotations

__all__ = ["warn"]


def warn(message: str, *arguments: object) -> None:
    """Log a warning, as that of the line that calls this."""
    try:
        import logging
    except OSError:  # a process that may open no more files goes on without
        return
    logging.getLogger("shmcache").warning(message, *arguments, stacklevel=2)
