"""How torch's threads wait, in processes of their own, for it can be chosen only once in each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os
from refinedet_cli.engine.openmp import load_torch_for_company
before = dict(os.environ)
{first}
load_torch_for_company()
import torch
assert dict(os.environ) == before
"""


def told(first: str = "", **environment: str) -> str:
    """What GNU OpenMP says of its settings when it is loaded."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(first=first)],
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not use GNU OpenMP")
    return done.stderr


def test_threads_of_torch_wait_briefly() -> None:
    assert "GOMP_SPINCOUNT = '2000'" in told()


def test_what_is_loaded_already_stays() -> None:
    assert "GOMP_SPINCOUNT = '2000'" not in told("import torch")


def test_what_a_user_says_counts() -> None:
    assert "GOMP_SPINCOUNT = '7'" in told(GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '2000'" not in told(OMP_WAIT_POLICY="active")
