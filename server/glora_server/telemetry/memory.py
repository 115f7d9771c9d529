"""What the system says about memory; Linux tells it in files, and nothing here fails elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of the container that this process is in (cgroup version 2, version 1); "max" where there is none."""


def resident_bytes(pid: int) -> int:
    """Resident size of a process; 0 where the system does not tell, or for no process (pid 0)."""
    if pid <= 0:
        return 0
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def memory_size() -> int:
    """Bytes of memory of the machine, or of the container where that is limited to less."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUP_LIMITS:
        try:
            limit = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():
            size = min(size, int(limit))
    return size
