"""This machine: its devices, settings under which PyTorch is faster on its CPU, and its description."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import timm
import torch

import dualtoken_vit
from dualtoken_vit.errors import InputError


def cores() -> int:
    """Of the processor, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: torch.device, threads: int | None = None) -> dict[str, str]:
    """Processor, device, system, versions, and the commit where this package is imported from a source tree.

    Args:
        device: what is computed on
        threads: CPU threads, if it is not this process that computes
    """
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    machine = {
        "CPU": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{cores()}, threads used: {threads or torch.get_num_threads()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, dualtoken_vit {dualtoken_vit.__version__}",
    }
    if found := commit():
        machine["commit"] = found
    return machine


def commit() -> str | None:
    """Commit of the source tree that this package is imported from, if it is one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return git.stdout.strip() or None


def pick_device(name: str) -> torch.device:
    """torch's device of that name; auto: the accelerator if there is one.

    Raises:
        InputError: for one that this machine does not have.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"device={name}: not on this machine; use auto or cpu") from None


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def tune_cpu() -> None:
    """Flush denormal numbers to zero, and keep freed memory for the next tensor.

    Untrained weights make numbers so small that a processor handles them in microcode. And glibc returns a large block
    to the kernel when a tensor is freed, which clears every page of it again for the next one; on some machines that
    takes longer than the arithmetic. Where the C library is another one, memory stays as it is.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
