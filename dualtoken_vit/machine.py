"""What a measurement was made on, in words."""

import os
import platform
import subprocess
from pathlib import Path

import timm
import torch

import dualtoken_vit


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
