"""Describe the machine, the commit, and the load by other programs."""

import os
import platform
import re
import shutil
import subprocess
import time
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
    """Return the processor's name in a form that suits a file name."""
    return re.sub(r"[^a-z0-9]+", "_", describe()["processor"].lower().replace("(r)", "")).strip("_")


def commit():
    """Return the commit that is measured, or "unknown". The commit ends in "-dirty" if files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def accelerator():
    """Return the names of NVIDIA's GPUs, or "none"."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "none"


class Load:
    """Measure how much of the cores others use after this object was made.

    Others are other programs, and other virtual machines on the same hardware.
    """

    def __init__(self):
        self.start = self._seconds()

    @staticmethod
    def _seconds():
        """Return the seconds of this process, of everything else, and of the clock."""
        try:
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            # This is not Linux, so nothing is known.
            ticks = [0] * 8
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = time.process_time()
        return own, busy - own if busy else 0, time.perf_counter()

    def of_others(self):
        """Return the share of all cores that others used."""
        _, others, clock = (now - then for now, then in zip(self._seconds(), self.start))
        return max(0.0, others / clock / os.cpu_count())
