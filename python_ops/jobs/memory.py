"""How much memory there is, so that a job that cannot fit says so before it begins."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What new processes can take without swapping, within the limit of a container (cgroup v2) where there is one.

    None where the system does not say in one place: anywhere but on Linux.
    """
    if not _MEMINFO.is_file():
        return None
    values = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(values["MemAvailable"].removesuffix("kB")) << 10
    left = _left_in_container()
    return available if left is None else min(available, left)


def gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _left_in_container() -> int | None:
    """The limit less what is used, but for the pages of files, which give way."""
    try:
        path = next(line[4:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::/"))
        folder = _CGROUPS / path
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, StopIteration):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics["inactive_file"]) + int(statistics["active_file"]))
