"""Processes that are killed while they train and save, and resume from each format in a new process."""

import os
import random
import signal
import time

import pytest

from tests import child_processes
from tests.comparison import assert_same_bits
from tests.test_keras import killed_training, resuming
from tests.test_keras.helpers import BACKEND

TIMEOUT = 300


def start(directory, source):
    environment = {"KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return child_processes.start(killed_training, directory, source, **environment)


def kill_after(process, directory, epoch, delay):
    """Kill a process some time after it has reported the end of an epoch; return the last epoch that it reported."""
    deadline, path = time.monotonic() + TIMEOUT, directory / "epoch.txt"
    while not path.exists() or int(path.read_text()) < epoch:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    return int(path.read_text())


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILL_ROUNDS", 1))))
def test_a_run_that_is_killed_while_it_saves_resumes_bit_for_bit_from_each_format(tmp_path, seed):
    rng = random.Random(f"{BACKEND} {seed}")
    formats = rng.sample(["keras", "weights", "backup"], 3)
    epoch, source, ends = 0, "none", []
    for following in (*formats, None):
        process = start(tmp_path, source)
        try:
            if following is None:
                child_processes.finish(process, TIMEOUT)
                break
            epoch += rng.randint(2, 4)
            ends.append(kill_after(process, tmp_path, epoch, rng.uniform(0, 0.1)))
        finally:
            process.kill()
        epoch, source = ends[-1], following
    for end, one in zip(ends, formats):
        # Before the save in which it was killed, or after.
        resumed = int((tmp_path / f"resumed-{one}.txt").read_text())
        assert resumed in (killed_training.BATCHES * (end - 1), killed_training.BATCHES * end)
    expected = killed_training.fit(resuming.make_model("outer"))
    assert_same_bits(resuming.read(tmp_path / "result.npz"), resuming.state(expected))
