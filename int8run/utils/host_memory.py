"""The memory that this process can still get from its machine, within the limits of its container.

`utils.hardware` calls it for devices without a memory of their own.
"""

import re
from pathlib import Path

import psutil

PROCESS_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# limit, use, and the part of the use that is files which were read: version 2, version 1
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def count_host_bytes() -> int:
    """What the machine has, and the limits of its control groups leave."""
    available: int = psutil.virtual_memory().available
    return min([available, *list_cgroup_room()])


def list_cgroup_room() -> list[int]:
    """Bytes up to each memory limit of Linux's control groups that holds for this process."""
    rooms: list[int] = []
    for folder in list_cgroup_folders():
        for limit_name, used_name, cached_name in CGROUP_FILES:
            try:
                limit = int((folder / limit_name).read_text())
                used = int((folder / used_name).read_text())
                statistics = (folder / "memory.stat").read_text()
            except (OSError, ValueError):  # not there, or `max`: no limit
                continue
            cached = re.search(rf"^{cached_name} (\d+)$", statistics, flags=re.MULTILINE)
            if cached is not None:
                used -= int(cached[1])  # files that were read, which make room for programs
            rooms.append(max(0, limit - used))
    return rooms


def list_cgroup_folders() -> list[Path]:
    """Where the control groups of this process may have their files; inside of a container at the top."""
    try:
        lines = PROCESS_CGROUPS.read_text().splitlines()
    except OSError:  # other systems
        return []
    folders = [CGROUPS, CGROUPS / "memory"]
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            folders.append(CGROUPS / path.lstrip("/"))
        elif "memory" in controllers.split(","):
            folders.append(CGROUPS / "memory" / path.lstrip("/"))
    return list(dict.fromkeys(folders))
