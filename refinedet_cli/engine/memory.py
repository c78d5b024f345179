"""How much memory this process takes, and whether it ran out of it; torch is not loaded to tell."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
_SHARED = Path("/dev/shm")


def peak_memory() -> int | None:
    """Tell the most bytes of physical memory that this process has held at once; None where it cannot be known.

    Libraries count with those of their pages that were touched, whoever else uses the same.
    """
    if _STATUS.is_file():
        # Not getrusage: there, on Linux, a process begins with the peak of the one that started it.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def free_memory() -> int | None:
    """Tell how many bytes this process could still take without swapping; None where it cannot be known.

    What the system would give back of its caches counts as free; the limit of a container counts as there is no more.
    """
    if not _SYSTEM.is_file():
        return None
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _SYSTEM.read_text(), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    try:
        limit, taken = ((_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free.append(max(0, int(limit) - int(taken)))
    except (OSError, ValueError):  # no container, or "max": no limit
        pass
    return min(free, default=None)


def free_shared_memory() -> int | None:
    """Tell how many bytes processes could still hand to each other; None where no such limit is known.

    Containers often have 64 MB, whatever memory they have.
    """
    return shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of the machine or of a device is used up."""
    # Only a process that has loaded torch can have run out of a device's memory, so there is no need to load it here.
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if isinstance(error, MemoryError) or (kind is not None and isinstance(error, kind)):
        return True
    # The CPU and MPS allocators raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and (
        "backend out of memory" in str(error) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
