"""How long the threads of torch wait for one another before they let other threads have the processor."""

from __future__ import annotations

import os
import sys

# Turns of an empty loop, about a tenth of a millisecond: as long as the gaps between the layers of a network.
_SPIN_COUNT = "2000"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def load_torch_for_company() -> None:
    """Load torch such that its threads go well with others, those that decode and draw, or those of other programs.

    By default a thread of GNU OpenMP that waits for its fellows keeps its core busy for milliseconds. On a core that
    is shared it so holds up the very threads that it waits for. Nothing is changed where torch is loaded already, or
    the environment says how threads wait.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _WAITING):
        return
    # The library reads it once, when torch loads it.
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["GOMP_SPINCOUNT"]
