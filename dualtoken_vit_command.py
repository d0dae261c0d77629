"""The command `dualtoken-vit`: what must be set before PyTorch is imported.

Where this module is imported first, `import dualtoken_vit` leaves PyTorch to the commands that need it.
"""

import os


def main() -> None:
    """Run the command line with OpenMP threads that sleep, not spin, while they wait for each other.

    Where other jobs need the cores, spinning threads keep them from each other: a training with two threads falls to a
    small part of its speed. On an idle machine sleeping costs some microseconds for each operation;
    OMP_WAIT_POLICY=active saves them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from dualtoken_vit.cli import main as run

    run()
