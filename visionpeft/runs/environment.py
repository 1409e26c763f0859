"""What a run was made with: versions of packages, hardware."""

import os
import platform
from functools import cache
from importlib.metadata import version

import torch

_RECORDED = ("visionpeft", "torch", "torchvision", "timm", "open_clip_torch", "lightning", "torchmetrics", "numpy")
_version = cache(version)  # it stays the same, and a protocol asks in every run


def usable_cores() -> int:
    """CPU cores that this process may use, which in a job of a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict:
    """Versions and hardware of this process."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _RECORDED},
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
    }
