"""The end of child processes in tests: a good one in time, or one by SIGKILL."""

import signal
import time


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
