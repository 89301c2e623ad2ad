"""Run the benchmark suite: measure what Lookahead adds to a step of the inner optimizer, here and in peers.

Each mode runs in its own processes and in its own environment. Within a process all programs are measured in turn, one
whole cycle at a time. Each machine has one JSON file, a list of runs. This run is added to the list. `report.py` makes
tables and plots from such files.
"""

import dataclasses
import datetime
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import cases
import machine
import report
from cases import MODES
from processes import ask, interpreter, measure

FOLDER = Path(__file__).resolve().parent


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="One small case for each mode, to see that all modes run.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only modes whose name contains this; repeatable.")] = None,
    kind: Annotated[str, typer.Option(help="Only this kind: step, outer, training, memory or scaling.")] = "",
    period: Annotated[int, typer.Option(help="Only this sync period; 0 means all.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="Only weights of this dtype: float32 or bfloat16.")] = "",
    output: Annotated[Path | None, typer.Option(help="The JSON file. Defaults to this machine's.")] = None,
) -> None:
    """Measure the time of a step with Lookahead, divided by the time of the same step without."""
    chosen = [
        case
        for case in (cases.quick() if quick else cases.full())
        if any(part in case.mode for part in only or [""]) and kind in ("", case.kind) and period in (0, case.period)
        if dtype in ("", case.dtype)
    ]
    console = Console(stderr=True)
    missing = sorted({case.mode for case in chosen if interpreter(case.mode) is None})
    if missing:
        console.print(f"Left out, as their environments do not exist: {', '.join(missing)}")
    chosen = [case for case in chosen if case.mode not in missing]
    if not chosen:
        raise SystemExit(
            f"No case is left. Received: --only {only!r} --kind {kind!r} --period {period} --dtype {dtype!r}. "
            f"Modes: {', '.join(MODES)}"
        )
    now = datetime.datetime.now(datetime.timezone.utc)
    run = {
        "date": now.date().isoformat(),
        "time": f"{now:%H:%M}",
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "results": [],
    }
    output = output or FOLDER / "results" / f"{'quick' if quick else machine.name()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(output.read_text()) if output.exists() and not quick else []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        # Cases of the kinds "step" and "training" share a process. Each other case has its own.
        for (mode, case_kind), group in itertools.groupby(chosen, key=lambda case: (case.mode, case.kind)):
            progress.update(task, description=f"{mode}: {case_kind}")
            group = list(group)
            shared = case_kind in ("step", "training")
            answers = ask(mode, group) if shared else itertools.chain.from_iterable(map(measure, group))
            for case, answer in zip(group, answers):
                run["results"].append({"case": dataclasses.asdict(case), **answer})
                progress.advance(task)
                # After each result, so that a run that is stopped keeps its results.
                output.write_text(report.written([*earlier, run]))
    report.print_table(run)
    console.print(f"Wrote {output}")
    failed = [one for one in run["results"] if "failed" in one]
    for one in failed:
        console.print(f"Failed: {one['case']}\n{one['failed']}")
    # In a full run, a case that takes too long is a result. Any other failure is an error.
    if any(quick or "not done in" not in one["failed"] for one in failed):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
