"""Child processes of tests: how they start, and how they end, by themselves in time or by SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(module, *arguments, options=(), output=subprocess.PIPE, **environment):
    """Start `python -m` with a module of these tests. Its output and its errors go to `output`."""
    return subprocess.Popen(
        [sys.executable, *options, "-m", module.__name__, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout):
    """Wait for a process, and check that it ended well."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]


def run_together(module, run, directory, world_size, timeout):
    """Run processes of `torch.distributed`, and check that all ended well. If one fails, the others are killed.

    Each gets RUN, DIRECTORY, its rank and their number, and prints to a file in the directory.
    """
    children = []
    for rank in range(world_size):
        output = directory / f"{run}-{rank}.txt"
        with output.open("w") as file:
            environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            process = start(module, run, directory, rank, world_size, output=file, **environment)
        children.append((process, output))
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process, _ in children) and time.monotonic() < deadline:
            if any(process.poll() for process, _ in children):
                break
            time.sleep(0.1)
    finally:
        for process, _ in children:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process, _ in children]
    outputs = "\n".join(output.read_text()[-3000:] for _, output in children)
    assert not any(codes), f"exit codes {codes}\n{outputs}"


def kill_when_reached(process, path, timeout):
    """Kill a process as soon as it has made a certain file."""
    deadline = time.monotonic() + timeout
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    assert path.exists()
