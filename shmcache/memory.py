"""How much memory is left to this process, by the machine and by the control groups it is in, is found out here.

Memory in /dev/shm counts like any other, and whoever takes more of it than there is gets no error but the OOM killer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PROC", "Room", "shortage"]

PROC = Path("/proc")


class Room(NamedTuple):
    """How many bytes are `left` of a limit, and whose limit it is: the folder of a control group, or the machine."""

    left: int
    limit: int
    whose: str


def shortage(size: int, proc: Path = PROC) -> Room | None:
    """A limit that leaves less than `size` bytes, if there is one. What the kernel can take back counts as left."""
    swap = 0
    try:
        machine = _numbers(proc / "meminfo")
        swap = machine["SwapFree:"] * 1024
        room = Room(machine["MemAvailable:"] * 1024 + swap, machine["MemTotal:"] * 1024, "this machine")
        if room.left < size:
            return room
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        groups = list(_groups(proc))
    except (OSError, ValueError):
        return None
    for folder in groups:
        for read in (_room_v2, _room_v1):
            try:
                room = read(folder, size, swap)
            except (OSError, KeyError, ValueError):  # of the other version, without a limit, or without this controller
                continue
            if room.left < size:
                return room
    return None


def _room_v2(folder: Path, size: int, free_swap: int) -> Room:
    limit = _number(folder / "memory.max")
    left = limit - _number(folder / "memory.current")
    if left < size:
        stat = _numbers(folder / "memory.stat")
        left += stat["inactive_file"] + stat["active_file"]
        if free_swap and (swap_limit := (folder / "memory.swap.max").read_text().strip()) != "max":
            free_swap = min(free_swap, int(swap_limit) - _number(folder / "memory.swap.current"))
        left += max(0, free_swap)
    return Room(left, limit, str(folder))


def _room_v1(folder: Path, size: int, free_swap: int) -> Room:
    limit = _number(folder / "memory.limit_in_bytes")
    without_swap = left = limit - _number(folder / "memory.usage_in_bytes")
    if left < size:
        stat = _numbers(folder / "memory.stat")
        left += stat["total_inactive_file"] + stat["total_active_file"]
        if free_swap:  # its limit is one of memory and swap together
            both = _number(folder / "memory.memsw.limit_in_bytes") - _number(folder / "memory.memsw.usage_in_bytes")
            free_swap = min(free_swap, both - without_swap)
        left += max(0, free_swap)
    return Room(left, limit, str(folder))


def _groups(proc: Path) -> Iterator[Path]:
    """The folders of the control groups whose memory limits hold for this process, innermost first."""
    paths: dict[str, str] = {}  # by version
    for line in (proc / "self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in (proc / "self/mountinfo").read_text().splitlines():
        # "36 35 0:32 /root /mount/point rw,relatime shared:1 - cgroup cgroup rw,memory"
        mount, _, kind = line.partition(" - ")
        version, _, options = kind.split(" ", 2)
        if version not in paths or (version == "cgroup" and "memory" not in options.split(",")):
            continue
        root, point = mount.split(" ")[3:5]
        path = paths[version]
        seen = path.startswith(root) and ".." not in path  # else the group lies beyond what is mounted
        folder, top = Path(point, path.removeprefix(root).lstrip("/") if seen else ""), Path(point)
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _number(path: Path) -> int:
    return int(path.read_text())


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number, perhaps with a unit behind."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {field[0]: int(field[1]) for field in fields}
