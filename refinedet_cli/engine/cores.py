"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Count the cores that this process is bound to, or fewer where its container gets no more time than theirs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (int(part) for part in _QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or "max": no limit
        return cores
    return max(1, min(cores, math.ceil(quota / period)))
