"""The memory limit of a container or a service, from Linux's control groups; what the kernel killed for memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VMSTAT, BOOT = Path("/proc/vmstat"), Path("/proc/sys/kernel/random/boot_id")
UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number of about 2^63."""


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process may still allocate below its limits; None without a limit.

    Cached file contents count as free: the kernel drops them before it kills a process.
    """
    left = [limit - used for limit, used in _groups(root, membership)]
    return max(0, min(left)) if left else None


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """The lowest limit in bytes on the groups of this process; None without a limit."""
    return min((limit for limit, _ in _groups(root, membership)), default=None)


def oom_kills(vmstat: Path = VMSTAT, boot: Path = BOOT) -> tuple[str, int] | None:
    """This boot of the machine, and the processes that the kernel has killed in it to free memory, of all its groups.

    The counters of a group alone would end with its container. None where the kernel does not count.
    """
    try:
        counters = dict(line.split() for line in vmstat.read_text().splitlines())
        return boot.read_text().strip(), int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _groups(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of each limited group, from the process's own up to the top."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's and not exist here; its own group is then the top one.
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(base) and (usage := _read(group, *names)):
                yield usage


def _read(group: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int] | None:
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= UNLIMITED:
            return None
        used = int((group / usage_name).read_text())
        entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in entries if name == cache_name), 0)
    except OSError:
        return None
    return int(limit), max(0, used - cached)
