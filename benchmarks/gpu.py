"""Test and measure on a GPU, in one command: correctness, waits, bandwidth, memory, graphs, training.

Each part runs in its own process, with a time limit. Results go to a JSON file at once. A part that fails does not stop
the others. First the tests and the parts that are not timed run side by side. Then the timed parts run one by one.
"""

import contextlib
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import machine
import report

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


@dataclass(frozen=True)
class Part:
    """A process that runs tests, if `tests` names files, or else a module of `on_device`.

    Args:
        name: The module.
        seconds: Time limit.
        tests: Files of tests.
        workers: Number of processes for the tests.
        backend: Backend of Keras, if it needs Keras.
        is_timed: Whether nothing else may run at the same time.
    """

    name: str
    seconds: int
    tests: tuple[str, ...] = ()
    workers: int = 2
    backend: str = ""
    is_timed: bool = True


CONFORMANCE = "tests/test_conformance.py"
IN_KERAS = CONFORMANCE, "tests/test_keras/test_device.py"
# Without designs the time limits add up to eight minutes: 85 seconds side by side, then the timed parts.
PARTS = [
    Part("tests of PyTorch and Optax", 85, (CONFORMANCE, "tests/test_torch/test_device.py"), 10, is_timed=False),
    Part("tests of Optax", 85, ("tests/test_optax/test_device.py",), is_timed=False),
    Part("tests of Keras on JAX", 85, IN_KERAS, 4, "jax", is_timed=False),
    Part("tests of Keras on PyTorch", 85, IN_KERAS, 2, "torch", is_timed=False),
    Part("torch_memory", 60, is_timed=False),
    Part("torch_waits", 60, is_timed=False),
    Part("jax_memory", 85, is_timed=False),
    Part("torch_syncs", 25),
    Part("jax_steps", 45),
    Part("torch_training", 95),
    Part("torch_steps", 60),
    Part("torch_offload", 15),
    Part("keras_steps", 25, backend="jax"),
    Part("keras_steps", 25, backend="torch"),
    Part("torch_graphs", 45),
    Part("jax_training", 60),
    Part("torch_sync_designs", 60),
    Part("jax_designs", 60),
]


class Findings:
    """The results of a run. Each is written at once to a file with a list of runs. This run is the last of the list."""

    def __init__(self, path: Path, about: dict[str, object]) -> None:
        self.path, self.about, self.parts, self.lock = path, about, [], threading.Lock()
        self.earlier = json.loads(path.read_text()) if path.exists() else []

    def add(self, part: str, case: str, result: object) -> None:
        with self.lock:
            self.parts.append({"part": part, "case": case, "result": result})
            runs = [*self.earlier, {**self.about, "parts": self.parts}]
            self.path.write_text(report.written(runs, by_line="parts"))
        print(f"{part}: {case}: {str(result)[:300]}", flush=True)


def label(part: Part) -> str:
    """Return a unique name of a part."""
    return f"{part.name} on {part.backend}" if part.backend and not part.tests else part.name


def run_part(part: Part, device: str, environment: dict[str, str], findings: Findings) -> None:
    """Run one part. Add its results, or the reason of its failure, to the findings."""
    name = label(part)
    start = time.monotonic()
    variables = {**environment, "LOOKAHEAD_DEVICE": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    variables.pop("KERAS_BACKEND", None)
    if part.backend or not part.tests:
        # Programs of Optax import Keras, too. They need its backend JAX.
        variables["KERAS_BACKEND"] = part.backend or "jax"
    if device == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        if part.tests:
            options = ["-q", "-n", str(part.workers), "-p", "no:cacheprovider", "-W", "default", f"--junitxml={xml}"]
            command = [sys.executable, "-m", "pytest", *options, *part.tests]
        else:
            command = [sys.executable, FOLDER / "on_device" / "worker.py", part.name, device]
        # The time limits are meant for a machine with a GPU and more cores.
        limit, lines = part.seconds if device != "cpu" else 10 * part.seconds, []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **pipes) as process:
            timer = threading.Timer(limit, _kill, [process])
            timer.start()
            for line in process.stdout:
                lines.append(line)
                # The last line may be cut off.
                if line.startswith("RESULT ") and line.endswith("\n"):
                    findings.add(name, *json.loads(line.removeprefix("RESULT ")))
        is_late = not timer.is_alive()
        timer.cancel()
        if part.tests:
            findings.add(name, "tests", tests_of(xml) if xml.exists() else {"failed": "".join(lines)[-3000:]})
    seconds = round(time.monotonic() - start, 1)
    end = {"seconds": seconds, "limit": limit}
    if is_late:
        end["failed"] = f"stopped after {limit} s"
    elif process.returncode and not part.tests:
        end["failed"] = "".join(lines)[-3000:]
    findings.add(name, "end", end)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


def tests_of(xml: Path) -> dict[str, object]:
    """Return from pytest's XML report how many tests passed, and which tests failed or were skipped."""
    found: dict[str, object] = {"passed": 0, "skipped": {}, "failures": {}}
    for case in ET.parse(xml).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        outcomes = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        if "skipped" in outcomes:
            reason = outcomes["skipped"].get("message", "")
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        elif outcomes:
            found["failures"][name] = next(iter(outcomes.values())).get("message", "")[:600]
        else:
            found["passed"] += 1
    return found


def main(
    device: Annotated[str, typer.Option(help="cuda; or cpu, to see that everything runs.")] = "cuda",
    wheels: Annotated[
        Path | None, typer.Option(help="A folder with wheels of packages that the machine lacks.")
    ] = None,
    designs: Annotated[bool, typer.Option("--designs", help="Also measure other designs of a sync.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only parts whose name contains this; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON file. Defaults to this device's in results.")] = None,
    commit: Annotated[str, typer.Option(help="The commit, if the files are not in a git repository.")] = "",
) -> None:
    """Find out on a GPU whether Lookahead is correct, whether it makes the host wait, and what it costs."""
    paths = [
        str(ROOT),
        str(ROOT / "src"),
        str(FOLDER),
        str(ROOT / "examples"),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    with tempfile.TemporaryDirectory() as site:
        if wheels is not None:
            found = sorted(map(str, wheels.glob("*.whl")))
            install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site]
            subprocess.run([sys.executable, *install, *found], check=True)
            paths.insert(0, site)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONWARNINGS": "ignore",
            # A cache, as many tests compile the same programs.
            "JAX_COMPILATION_CACHE_DIR": str(Path(site) / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        accelerator = machine.accelerator() if device != "cpu" else "none"
        if output is None:
            output = FOLDER / "results" / f"gpu_{re.sub(r'[^a-z0-9]+', '_', accelerator.lower())}.json"
        now = datetime.datetime.now(datetime.timezone.utc)
        about = {
            "date": now.date().isoformat(),
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "commit": commit or machine.commit(),
            "device": device,
            "machine": machine.describe(),
        }
        findings = Findings(output, about)
        parts = [part for part in PARTS if designs or not part.name.endswith("designs")]
        chosen = [part for part in parts if any(one in f"{part.name} {part.backend}" for one in only or [""])]
        if not chosen:
            names = ", ".join(dict.fromkeys(part.name for part in PARTS))
            raise SystemExit(f"No part is left. Received: --only {only!r}. Parts: {names}")
        with ThreadPoolExecutor() as pool:
            side_by_side = [part for part in chosen if not part.is_timed]
            list(pool.map(lambda part: run_part(part, device, environment, findings), side_by_side))
        for part in chosen:
            if part.is_timed:
                run_part(part, device, environment, findings)
    failed = [one for one in findings.parts if _has_failed(one["result"])]
    for one in failed:
        print(f"FAILED {one['part']}: {one['case']}: {one['result']}"[:1500])
    print(f"Wrote {output}")
    raise SystemExit(1 if failed else 0)


def _has_failed(result: object) -> bool:
    return isinstance(result, dict) and bool(result.get("failed") or result.get("failures"))


if __name__ == "__main__":
    typer.run(main)
