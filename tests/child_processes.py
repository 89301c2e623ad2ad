"""Child processes of tests: how they start, and how they end, by themselves in time or by SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(module, *arguments, options=(), output=subprocess.PIPE, **environment):
    """Start `python -m` with a module of these tests. What it prints, errors too, goes to `output`."""
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


def kill_when_reached(process, path, timeout):
    """Kill a process as soon as a file is there that it makes."""
    deadline = time.monotonic() + timeout
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    assert path.exists()
