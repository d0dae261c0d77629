"""Settings of this process under which PyTorch runs faster on the CPU; for programs, not for importers."""

import ctypes

import torch

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
