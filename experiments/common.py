"""What the experiments share: their command line, the file of results, and the look of tables and plots."""

import datetime
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import scipy.stats
import typer
from rich.progress import track

FOLDER = Path(__file__).resolve().parent
BARE, FAST, SLOW = "#D55E00", "#56B4E9", "#0072B2"


def markdown(heading, rows):
    """Return a table in Markdown; numbers are aligned to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def paired(values, others):
    """Return the mean difference of two sequences, one pair for each seed, and its 95% interval by bootstrap.

    The interval is that of resampled pairs (Efron's percentile method). With few seeds it is too narrow: with three
    pairs it is their range, and contains the true mean in about 75 of 100 cases. One pair has no interval: its ends are
    NaN.
    """
    differences = np.subtract(values, others)
    if len(differences) < 2:
        return float(differences.mean()), np.nan, np.nan
    found = scipy.stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return float(differences.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high)


def in_words(difference, digits=2):
    """Return a difference and its interval, as `paired` gives them, in words."""
    mean, low, high = difference
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def in_processes(function, tasks):
    """Return what a function returns for each of a list of tasks, computed in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count()) as pool:
        return list(track(pool.imap(function, tasks), total=len(tasks)))


def written():
    """Return the bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def bytes_sent(workers, size):
    """Return the bytes that a worker sends in a reduction of so many bytes, by a ring or a tree."""
    return 2 * (workers - 1) / workers * size


def draw(module, content, folder):
    """Write an experiment's tables and plots, made of its results alone."""
    folder.mkdir(parents=True, exist_ok=True)
    name = content["experiment"]
    for table, text in module.tables(content["results"]).items():
        (folder / f"{name}_{table}.md").write_text(text)
    style = {
        "svg.hashsalt": "lookahead-optim",
        "svg.fonttype": "none",
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 9,
    }
    with mpl.rc_context(style):
        for plot, figure in module.plots(content["results"]).items():
            figure.savefig(folder / f"{name}_{plot}.svg", metadata={"Date": None})


def command(module, packages):
    """Run an experiment from the command line.

    Args:
        module: The experiment, with functions `run(quick)`, which returns its results, `tables(results)` and
            `plots(results)`, which return texts and figures by name.
        packages: Names of the packages whose versions belong to the results.
    """
    name = Path(module.__file__).stem

    def main(
        quick: Annotated[
            bool, typer.Option("--quick", help="A small run, to see that all works; into experiments/quick.")
        ] = False,
        output: Annotated[
            Path | None, typer.Option(help="Folder for the results. Defaults to experiments/results.")
        ] = None,
        drawn: Annotated[
            Path | None, typer.Option(help="Folder for tables and plots. Defaults to docs/experiments/drawn.")
        ] = None,
        draw_only: Annotated[bool, typer.Option("--draw-only", help="Draw the results that are there.")] = False,
    ) -> None:
        output = output or FOLDER / ("quick" if quick else "results")
        drawn = drawn or (output if quick else FOLDER.parent / "docs" / "experiments" / "drawn")
        path = output / f"{name}.json"
        if draw_only and not path.exists():
            raise typer.BadParameter(
                f"There are no results to draw: {path}. Run it without.", param_hint="'--draw-only'"
            )
        if not draw_only:
            start = time.perf_counter()
            results = module.run(quick)
            content = {
                "experiment": name,
                "command": f"python experiments/{name}.py{' --quick' if quick else ''}",
                "date": datetime.date.today().isoformat(),
                "seconds": round(time.perf_counter() - start),
                "versions": {
                    "python": platform.python_version(),
                    **{one: importlib.metadata.version(one) for one in packages},
                },
                "cores": os.cpu_count(),
                "results": results,
            }
            output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        draw(module, json.loads(path.read_text()), drawn)
        typer.echo(f"Results: {path}. Tables and plots: {drawn}")

    main.__doc__ = inspect.cleandoc(module.__doc__)
    typer.run(main)
