"""What a result was made with: versions, machine and date."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rankopt.core.files import available_cores
from rankopt.core.result_record import EnvironmentEntry


def environment(device: torch.device) -> EnvironmentEntry:
    """Describe this process for result.json.

    Args:
        device: The device of the model.
    """
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "rankopt": _version("rankopt"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else str(device),
        "processor": processor(),
        "cores": available_cores(),
    }


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [x.partition(":")[2].strip() for x in lines if x.startswith(("model name", "Model"))]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "unknown"
