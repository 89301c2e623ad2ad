"""The benchmark suite: what Lookahead adds to a step, over the bare optimizer, for this library and for its peers.

Each mode runs in processes of its own, with what its environment has installed. Within a process all programs are
measured in turn, one whole cycle at a time. Everything measured goes to one JSON file; `report.py` makes tables and
plots of such files.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated

import cases
import typer
from cases import MODES
from report import print_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FOLDER = Path(__file__).resolve().parent
# Seconds that one case may take, compilation included.
TIMEOUT = 150


def machine():
    """Return what the results depend on beside the programs."""
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


def accelerator():
    """Return the names of NVIDIA's devices, or "none"."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "none"


def interpreter(mode):
    """Return the Python of the first environment of a mode that was made, or None."""
    paths = [FOLDER.parent / one / "bin" / "python" for one in MODES[mode].environments]
    return next((path for path in paths if path.exists()), None)


def ask(mode, asked, *arguments):
    """Run a process of a mode for some cases; yield the result of each, or the reason why there is none."""
    if not asked:
        return
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    environment.pop("KERAS_BACKEND", None)
    if MODES[mode].backend:
        environment["KERAS_BACKEND"] = MODES[mode].backend
    process = subprocess.Popen(
        [interpreter(mode), FOLDER / "worker.py", MODES[mode].module, *arguments],
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
                yield from ask(mode, asked[number + 1 :], *arguments)
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
    """Yield the result of one case that needs processes of its own."""
    if case.kind != "memory":
        yield from ask(case.mode, [case])
        return
    (names,) = ask(case.mode, [case])
    if "failed" in names:
        yield names
        return
    answers = {name: next(iter(ask(case.mode, [case], name))) for name in names["result"]}
    failed = [one["failed"] for one in answers.values() if "failed" in one]
    yield {"failed": failed[0]} if failed else {**names, "result": {n: one["result"] for n, one in answers.items()}}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One small case for each mode, to see that all run.")] = False,
    only: Annotated[str, typer.Option(help="Only modes whose name contains this.")] = "",
    kind: Annotated[str, typer.Option(help="Only this kind: step, training, memory or scaling.")] = "",
    period: Annotated[int, typer.Option(help="Only this sync period; 0 means all.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="The JSON file. Defaults to one in benchmarks/results.")] = None,
) -> None:
    """Measure what Lookahead adds to an optimizer step and to a training step, as a ratio to the bare optimizer."""
    chosen = [
        case
        for case in (cases.quick() if quick else cases.full())
        if only in case.mode and kind in ("", case.kind) and period in (0, case.period)
    ]
    console = Console(stderr=True)
    missing = sorted({case.mode for case in chosen if interpreter(case.mode) is None})
    if missing:
        console.print(f"Left out, as their environments were not made: {', '.join(missing)}")
    chosen = [case for case in chosen if case.mode not in missing]
    if not chosen:
        raise SystemExit(f"No case is left. Received: --only {only!r} --kind {kind!r}. Modes: {', '.join(MODES)}")
    results = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        # Memory and scaling change a process, so each of their cases has its own.
        for (mode, case_kind), group in itertools.groupby(chosen, key=lambda case: (case.mode, case.kind)):
            progress.update(task, description=f"{mode}: {case_kind}")
            group = list(group)
            shared = case_kind in ("step", "training")
            answers = ask(mode, group) if shared else itertools.chain.from_iterable(map(measure, group))
            for case, answer in zip(group, answers):
                results.append({"case": dataclasses.asdict(case), **answer})
                progress.advance(task)
    run = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "machine": machine(),
        "results": results,
    }
    output = output or FOLDER / "results" / f"{'quick' if quick else run['date']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(run, indent=None, separators=(",", ":")) + "\n")
    print_table(run)
    console.print(f"Wrote {output}")
    failed = [one for one in results if "failed" in one]
    for one in failed:
        console.print(f"Failed: {one['case']}\n{one['failed']}")
    # A case that takes too long is a result; anything else is an error.
    if any("not done in" not in one["failed"] for one in failed):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
