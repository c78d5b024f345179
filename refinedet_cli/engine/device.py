"""Where to compute, and in which precision."""

from __future__ import annotations

from typing import Literal

import torch

from refinedet_cli.core.words import counted
from refinedet_cli.errors import DeviceError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["auto", "fp32", "bf16"]
Precision = Literal["fp32", "bf16"]


def select_device(name: DeviceName) -> torch.device:
    """Choose a device; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        DeviceError: the named device is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if not present[name]:
        raise DeviceError(f"device {name!r} is not available on this machine", "leave --device out, or use cpu")
    return torch.device(name)


def select_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Choose a precision; "auto" takes bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def describe_device(device: torch.device) -> str:
    """Name the device as a person would."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({counted(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else device.type
