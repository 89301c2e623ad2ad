"""What the results depend on beside the programs."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path


def describe():
    """Return processor, cores, system, Python, allocator and accelerator, by name."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]
    preloaded = [Path(one).name for one in os.environ.get("LD_PRELOAD", "").split()]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "allocator": preloaded or "the system's",
        "accelerator": accelerator(),
    }


def name():
    """Return the processor as a name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", describe()["processor"].lower().replace("(r)", "")).strip("_")


def commit():
    """Return the commit that is measured, with a mark if files differ from it, or "unknown"."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def accelerator():
    """Return the names of NVIDIA's devices, or "none"."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "none"
