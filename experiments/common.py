"""What the experiments share: their command line, the file of results, and the look of tables and plots."""

import datetime
import importlib.metadata
import inspect
import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer

FOLDER = Path(__file__).resolve().parent
BARE, FAST, SLOW = "#D55E00", "#56B4E9", "#0072B2"


def markdown(heading, rows):
    """Return a table in Markdown; numbers are aligned to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


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
