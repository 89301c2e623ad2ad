"""Make tables and a plot from the results of `gpu.py`. They contain nothing else.

python benchmarks/report_gpu.py docs/benchmarks_gpu benchmarks/results/gpu_*.json
"""

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer

from cases import ARRAYS
from gpu import PARTS, label
from report import OURS, markdown, shown_name
from timing import limit

PEERS = ("timm", "pytorch_optimizer")
# Inner optimizers that move exactly the arrays of `ARRAYS`, so that they have a limit.
INNER_ARRAYS = {"SGD, foreach": "SGD", "AdamW, fused": "Adam"}


def read(paths):
    """Return the runs in the files: dictionaries with the results in `parts`, and entries about the run."""
    return list(itertools.chain.from_iterable(json.loads(path.read_text()) for path in paths))


def cases_of(runs, part):
    """Return the results of a part, by case, without failures. The last result of each program counts."""
    found = {}
    for run in runs:
        for one in run["parts"]:
            if one["part"] == part and one["case"] not in ("versions", "end") and "failed" not in one["result"]:
                found.setdefault(one["case"], {}).update(one["result"])
    return found


def shown(figures):
    low, high = figures["quartiles"]
    return f"{figures['median']:.2f} ({low:.2f}-{high:.2f})"


def milliseconds(figures):
    return f"{figures['median'] * 1e3:.3g}"


def about(runs):
    """Return a text about the machine and the versions, and the table of runs."""
    machine, versions = runs[-1]["machine"], {}
    for one in itertools.chain.from_iterable(run["parts"] for run in runs):
        versions |= one["result"] if one["case"] == "versions" else one["result"].get("versions", {})
    text = (
        f"Measured on {machine['accelerator']}, {machine['cores']} cores of {machine['processor']}, Python "
        f"{machine['python']}. Versions: {', '.join(f'{name} {one}' for name, one in sorted(versions.items()))}.\n\n"
    )
    rows = [[f"`{run['command']}`", run["date"], run["commit"], run.get("note", "")] for run in runs]
    return text + markdown(["command", "date", "commit", "note"], rows)


def tests(runs):
    """Return the table of tests, from the last run of each part."""
    found = {}
    for run in runs:
        for one in run["parts"]:
            if one["case"] == "tests":
                found[one["part"].removeprefix("tests of ")] = run["commit"], one["result"]
    rows = []
    for name, (commit, result) in found.items():
        failed = "; ".join(result.get("failures", {})) or "none"
        skipped = "; ".join(f"{number}: {reason}" for reason, number in result.get("skipped", {}).items()) or "none"
        rows.append([name, commit, str(result.get("passed", 0)), skipped, failed])
    return markdown(["tests of", "commit", "passed", "skipped", "failed"], rows)


def training(runs):
    rows = []
    for name, result in cases_of(runs, "torch_training").items():
        row = [f"PyTorch, {name}", milliseconds(result["bare, seconds"])]
        rows.append([*row, shown(result[OURS]), shown(result["bare, again"])])
    for name, result in cases_of(runs, "jax_training").items():
        for form in (OURS, f"{OURS}, apply_gradients"):
            row = [f"Optax, {name}{form.removeprefix(OURS)}", milliseconds(result["bare"]["seconds"])]
            rows.append([*row, shown(result[form]["ratio"]), shown(result["bare, again"]["ratio"])])
    return markdown(["training step", "bare, ms", "time / bare time", "bare again / bare"], rows)


def steps(runs):
    rows = []
    for name, result in cases_of(runs, "torch_steps").items():
        weights, *inner, period = name.rsplit(", ", 3)
        inner, period = ", ".join(inner), int(period.removeprefix("period "))
        arrays = INNER_ARRAYS.get(inner)
        bound = f"{limit(ARRAYS[arrays], period):.2f}" if arrays else "-"
        row = [weights, inner, str(period), milliseconds(result["bare, seconds"]), bound]
        rows.append([*row, *(shown(result[one]) if one in result else "-" for one in (OURS, *PEERS))])
    header = ["weights", "inner optimizer", "period", "bare, ms", "limit"]
    return markdown([*header, *(f"{one} / bare" for one in (OURS, *PEERS))], rows)


def optax_steps(runs):
    rows = []
    for name, result in cases_of(runs, "jax_steps").items():
        for program, figures in result.items():
            if isinstance(figures, dict) and program != "bare" and "in place" not in program:
                share = figures["share of a step after which the host continues"]["median"]
                bare = milliseconds(result["bare"]["seconds"])
                size = f"{figures['gigabytes, as planned']:.3g}"
                rows.append([name, bare, shown_name(program), shown(figures["ratio"]), f"{share:.2f}", size])
    header = ["weights, inner optimizer", "bare, ms", "program", "time / bare time"]
    return markdown([*header, "host continues after (share of the step)", "GB that XLA plans to move"], rows)


def syncs(runs):
    rows = []
    for name, result in cases_of(runs, "torch_syncs").items():
        device, host = (result[f"sync, seconds on the {one}"] for one in ("device", "host"))
        row = [name, str(result["weights"]), milliseconds(device), milliseconds(host)]
        rows.append([*row, shown(result["sync, fraction of the copy"])])
    return markdown(["weights", "number", "on the GPU, ms", "on the host, ms", "fraction of a copy's bandwidth"], rows)


def sync_designs(runs):
    found, columns = {}, []
    for name, result in cases_of(runs, "torch_sync_designs").items():
        columns.append(name)
        for design, figures in result.items():
            if isinstance(figures, dict):
                cell = shown(figures["fraction of the copy"]) if "fraction of the copy" in figures else "does not run"
                found.setdefault(design, {})[name] = cell
                if figures.get("equal bits") is False:
                    found[design][name] += ", other bits"
    rows = [[design, *(cells.get(column, "-") for column in columns)] for design, cells in found.items()]
    return markdown(["design, fraction of a copy's bandwidth", *columns], rows)


def optax_designs(runs):
    found = cases_of(runs, "jax_designs")
    ratios = {}
    for inner, result in found.items():
        for design, figures in result.items():
            if isinstance(figures, dict) and design != "bare":
                ratios.setdefault(design, {})[inner] = shown(figures["ratio"])
    for name, result in cases_of(runs, "jax_steps").items():
        inner = name.removeprefix("1 GiB, large, ")
        for program, figures in result.items():
            if program.endswith("in place") and inner in found:
                ratios.setdefault("conditional of all, conditional", {})[inner] = shown(figures["ratio"])
    rows = [[design, *(cells.get(inner, "-") for inner in found)] for design, cells in ratios.items()]
    return markdown(["capture, restart", *(f"{inner}: time / bare time" for inner in found)], rows)


def memory(runs):
    rows = []
    for name, result in cases_of(runs, "torch_memory").items():
        more = [result[f"{OURS}: {one}"] - result[f"bare: {one}"] for one in ("held", "peak of a cycle")]
        rest = result["a sync adds"], result["a block holds"]
        rows.append([f"PyTorch, {name}", OURS, *(f"{one:.3f}" for one in (*more, *rest))])
    for name, result in cases_of(runs, "jax_memory").items():
        for program in dict.fromkeys(key.split(": ")[0] for key in result if ": " in key):
            if program != "bare" and "in place" not in program:
                more = [result[f"{program}: {one}"] - result[f"bare: {one}"] for one in ("held", "peak")]
                rows.append([f"Optax, {name}", shown_name(program), *(f"{one:.3f}" for one in more), "-", "-"])
    header = ["inner optimizer, weights", "program", "held", "peak of a cycle", "a sync adds"]
    return markdown([*header, "a `slow_weights()` block adds"], rows)


def waits(runs):
    rows = []
    for name, result in cases_of(runs, "torch_waits").items():
        if "bare" not in result or "5 steps" not in result["bare"]:
            continue
        row = [name]
        for kind, steps_in_it in (("5 steps", 5), ("the step with a sync", 1)):
            for program in ("bare", OURS):
                counts = result[program][kind]
                # The profiler itself waits once.
                stops = sum(number for call, number in counts.items() if "Synchronize" in call) - 1
                launches = sum(number for call, number in counts.items() if "Launch" in call)
                row.append(f"launches: {launches / steps_in_it:g}, waits: {stops}")
        rows.append(row)
    kinds = "step between syncs", "step with a sync"
    return markdown(["inner optimizer", *(f"{kind}: {name}" for kind in kinds for name in ("bare", OURS))], rows)


def graphs(runs):
    rows = []
    for name, result in cases_of(runs, "torch_graphs").items():
        for key, figures in result.items():
            if key.endswith("ratio"):
                rows.append([name, key.removesuffix(", ratio"), shown(figures)])
    return markdown(["what", "how", "time / bare time"], rows)


def missing(runs):
    """Return the table of parts that never ran to their end, with the reason in the last run that had them."""
    ends = {}
    for run in runs:
        for one in run["parts"]:
            ends.setdefault(one["part"], "the run was cut short during this part")
            if one["case"] == "end":
                ends[one["part"]] = (one["result"].get("failed", "").strip().splitlines() or [""])[-1]
    reasons = {label(part): ends.get(label(part), "this part never started") for part in PARTS}
    rows = [[part, reason] for part, reason in reasons.items() if reason]
    return markdown(["part", "why it is incomplete"], rows) if rows else "None.\n"


def plot_steps(runs, path):
    """Draw the ratios of PyTorch's optimizer steps at period 6, with quartiles, peers and the limit."""
    from matplotlib.figure import Figure

    found = {name: one for name, one in cases_of(runs, "torch_steps").items() if name.endswith("period 6")}
    inners = ("AdamW, fused", "AdamW, foreach", "SGD, foreach")
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, len(inners), sharey=True)
    labels = list(dict.fromkeys(name.rsplit(", ", 3)[0] for name in found))
    for axes, inner in zip(panels, inners):
        for row, size in enumerate(labels):
            result = found.get(f"{size}, {inner}, period 6", {})
            for offset, (name, marker) in enumerate(((OURS, "o"), ("timm", "s"), ("pytorch_optimizer", "^"))):
                if name in result:
                    y, color = row + 0.2 * (offset - 1), f"C{offset}"
                    axes.plot(result[name]["quartiles"], [y, y], color=color, linewidth=1)
                    axes.plot(result[name]["median"], y, marker, color=color, markersize=4, label=name)
        if inner in INNER_ARRAYS:
            axes.axvline(limit(ARRAYS[INNER_ARRAYS[inner]], 6), color="0.4", linestyle="--", linewidth=1)
        axes.axvline(1, color="0.7", linewidth=0.8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_xscale("log", base=2)
        ticks = [1, 1.25, 1.5, 2, 3, 4]
        axes.set_xticks(ticks, map(str, ticks), fontsize=8)
        axes.minorticks_off()
        axes.set_title(inner, fontsize=9)
        axes.set_xlabel("step time / bare step time, period 6", fontsize=8)
    panels[0].invert_yaxis()
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    panels[-1].legend(handles.values(), handles.keys(), fontsize=7)
    figure.savefig(path, metadata={"Date": None})


TABLES = {
    "about": about,
    "tests": tests,
    "training": training,
    "steps": steps,
    "optax": optax_steps,
    "syncs": syncs,
    "sync_designs": sync_designs,
    "optax_designs": optax_designs,
    "memory": memory,
    "waits": waits,
    "graphs": graphs,
    "missing": missing,
}


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write Markdown tables and a plot.")],
    results: Annotated[list[Path], typer.Argument(help="JSON files of `gpu.py`, of one machine.", exists=True)],
) -> None:
    """Make tables and a plot of results."""
    import matplotlib as mpl

    runs = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in TABLES.items():
        (folder / f"{name}.md").write_text(table(runs))
    with mpl.rc_context({"svg.hashsalt": "lookahead-optim", "svg.fonttype": "none"}):
        plot_steps(runs, folder / "steps.svg")


if __name__ == "__main__":
    typer.run(main)
