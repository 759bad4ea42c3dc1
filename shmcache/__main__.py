"""`python -m shmcache` is the `shmcache` command."""

from __future__ import annotations

from shmcache.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
