"""Whether kernels run on a device, which nobody knows before one has: Triton does not know every GPU, and wants a C
compiler."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def works(launch: Callable[[], Any], what: str, device: torch.device) -> bool:
    """Whether `launch`, a small piece of the work, goes through. Where it does not, a warning says that `what` runs
    torch operations instead, and why."""
    try:
        launch()
    except Exception as problem:  # whatever it is, there is another way
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        warnings.warn(f"{what} run torch operations on {device}: Triton fails there ({reason})", stacklevel=5)
        return False
    return True
