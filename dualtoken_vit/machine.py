"""The devices and description of this machine, and settings that make PyTorch faster on its CPU.

PyTorch is imported by the functions that need it: `print_environment` works without it.
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dualtoken_vit.errors import InputError

if TYPE_CHECKING:
    import torch

EXTRAS = ("models", "train", "runtime", "export", "data", "video")  # whose packages `print_environment` lists


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """The name of the CPU."""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def print_environment() -> None:
    """Print versions and hardware, a line for each, as bug reports need them."""
    found = {
        "dualtoken-vit": f"{sys.modules['dualtoken_vit'].__version__} {commit() or ''}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    found |= {"CPU": f"{_cpu()}, {cores()} cores"}
    if find_spec("torch"):
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        found["accelerators"] = ", ".join(gpus) or (accelerator.type if accelerator else "none")
    wanted = [line for line in requires("dualtoken-vit") or () if re.search(rf"extra == .({'|'.join(EXTRAS)}).", line)]
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in wanted} - {"dualtoken-vit"})
    missing = []
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        found["not installed"] = ", ".join(missing)
    variables = [key for key in os.environ if key.startswith(("OMP_", "MKL_", "CUDA_VISIBLE", "PYTORCH_"))]
    found |= {key: os.environ[key] for key in sorted(variables)}
    print("\n".join(f"{key:<20} {value}".rstrip() for key, value in found.items()))


def describe(device: "torch.device", threads: int | str | None = None) -> dict[str, str]:
    """CPU, device, system, versions, and the commit if this package is imported from a git checkout.

    `threads` is the number of CPU threads, where it is not this process's.
    """
    import timm
    import torch

    machine = {
        "CPU": f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{cores()}, threads used: {threads or torch.get_num_threads()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, dualtoken_vit {version('dualtoken-vit')}",
    }
    found = commit()
    return machine | ({"commit": found} if found else {})


def commit() -> str | None:
    """Commit of the git checkout that this package is imported from; None if it is not in one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return git.stdout.strip() or None


def pick_device(name: str) -> "torch.device":
    """The torch device of that name, or an InputError; auto: an accelerator if there is one, else the CPU."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"device={name}: not available on this machine; use auto or cpu") from None


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def tune_cpu() -> None:
    """Flush denormal numbers to zero, and let glibc reuse freed memory.

    Untrained networks produce denormal numbers, which CPUs process in slow microcode. By default glibc returns large
    freed blocks to the kernel, which must clear every page for the next tensor; on some machines this takes longer than
    the arithmetic. With other C libraries the allocator is left unchanged.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
