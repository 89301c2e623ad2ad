"""Start the processes that measure. Each mode has its own environment, and each case has a time limit."""

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path

from cases import MODES

FOLDER = Path(__file__).resolve().parent
# The allocator gives freed memory back at once. So the memory of a process is what its programs use.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
# Seconds that one case may take, compilation included.
TIMEOUT = 600


def interpreter(mode):
    """Return the Python of the first environment of a mode that exists, or None."""
    environments = [FOLDER.parent / one for one in MODES[mode].environments]
    return next((one / "bin" / "python" for one in environments if (one / ".installed").exists()), None)


def ask(mode, asked, *arguments, **variables):
    """Run cases of one module in a process of a mode. Yield the result of each case, or the reason for a failure.

    Args:
        mode: A key of `MODES`.
        asked: The cases.
        *arguments: Further arguments for `worker.py`.
        **variables: Further environment variables.
    """
    if not asked:
        return
    environment = {
        **os.environ,
        **variables,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
        # Otherwise the first call of a program could reuse what was compiled for another program.
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    environment.pop("KERAS_BACKEND", None)
    if MODES[mode].backend:
        environment["KERAS_BACKEND"] = MODES[mode].backend
    process = subprocess.Popen(
        [interpreter(mode), FOLDER / "worker.py", asked[0].module, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr))
    reader.start()
    try:
        for number, case in enumerate(asked):
            timer = threading.Timer(TIMEOUT, process.kill)
            timer.start()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
                process.stdin.flush()
            lines = iter(process.stdout.readline, "")
            answer = next((line for line in lines if line.startswith("RESULT ")), None)
            late = not timer.is_alive()
            timer.cancel()
            if answer is None:
                process.wait()
                reader.join()
                reason = f"not done in {TIMEOUT} s" if late else "".join(errors)[-2000:]
                yield {"failed": reason}
                yield from ask(mode, asked[number + 1 :], *arguments, **variables)
                return
            yield json.loads(answer.removeprefix("RESULT "))
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdout, process.stderr, process.stdin):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def measure(case):
    """Yield the result of a case that needs its own process, or a process for each of its programs."""
    if case.kind != "memory":
        yield from ask(case.mode, [case])
        return
    (names,) = ask(case.mode, [case])
    if "failed" in names:
        yield names
        return
    answers = {name: next(iter(ask(case.mode, [case], name, **GIVES_BACK))) for name in names["result"]}
    failed = [one["failed"] for one in answers.values() if "failed" in one]
    yield {"failed": failed[0]} if failed else {**names, "result": {n: one["result"] for n, one in answers.items()}}
