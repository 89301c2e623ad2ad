"""Make tables and plots from the results of `run.py`. They contain nothing else.

python benchmarks/report.py docs/benchmarks benchmarks/results/*.json
"""

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cases import ARRAYS, MODELS, MODES, SHAPES, full
from timing import limit, quartiles, ratios

OURS = "lookahead-optim"
# Aims, by inner optimizer. The time of a step with Lookahead, divided by the time of the bare step, should be at most
# this at period 6. They are for ten large weights, for four hundred small weights, and for a training step. No design
# that was tried reaches stricter aims everywhere.
LARGE_AIMS = {"SGD": 1.40, "Adam": 1.10}
SMALL_AIMS = {
    "call by call": {"SGD": 1.40, "Adam": 1.10},
    "a graph of TensorFlow": {"SGD": 1.60, "Adam": 1.20},
    # Merely passing a second copy of the weights to the step and back costs nearly as much.
    "compiled by XLA": {"SGD": 2.00, "Adam": 1.55},
}
TRAINING_AIM = 1.02
# Aims: the time of a step of TensorFlow Addons divided by the time of a step of this library, at least.
ADDONS_AIMS = {"SGD": 4.00, "Adam": 2.00}
# Tables that the docs show for every machine. The other tables are for the machine of the last run alone.
EARLIER = ("about", "aims", "training_aims", "memory", "scaling", "every_step", "training")
# Programs whose names in results need more words in a table.
NAMES = {"bare, one more copy carried": "bare, passing a second copy", "optax": "optax.lookahead"}
# Where a peer does different work, so that times are not quite comparable.
NOTES = {
    "timm": "the first sync only captures; weights without a gradient are not synced",
    "pytorch_optimizer": "weights without a gradient are not synced",
    "torch_optimizer": "syncs at steps 1, k + 1, 2k + 1",
    "tensorflow_addons": "weights without a gradient are not synced",
    "bare, one more copy carried": "no Lookahead: only passes a second copy of the parameters to the step",
    "optax": "works on pairs of parameters, `LookaheadParams`",
}


def of_kind(run, kind):
    """Return the results of one kind of case, without cases that failed."""
    return [one for one in run["results"] if one["case"]["kind"] == kind and "result" in one]


def ratio_of(result, name):
    """Return the quartiles of a program's time divided by the bare program's time."""
    return quartiles(ratios(result[name]["seconds"], result["bare"]["seconds"]))


def shown(figures):
    low, median, high = figures
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def what(case):
    return f"{case['model']}, {case['loop']}" if case["model"] else f"{case['weights']} x {case['side']}²"


def shown_name(name):
    """Return a program's name as tables show it."""
    return NAMES.get(name, name)


def form(name):
    """Return what follows the mode in a label: nothing for `OURS`, or for example ": apply_gradients" or ": timm"."""
    return "" if name == OURS else f": {shown_name(name.removeprefix(OURS + ', '))}"


def step_rows(run, kind="step"):
    """Return header and rows of the table of steps: one row for each program, without the bare programs."""
    rows = []
    for one in of_kind(run, kind):
        case, result = one["case"], one["result"]
        bare = statistics.median(result["bare"]["seconds"]) * 1e3
        bounds = [f"{limit(ARRAYS[case['inner']], case['period'], fused):.2f}" for fused in (False, True)]
        bound = "-" if kind == "training" else ", ".join(bounds)
        for name in result:
            if name != "bare":
                row = [case["mode"], case["inner"], what(case), str(case["period"]), f"{bare:.2f}", bound]
                rows.append([*row, shown_name(name), shown(ratio_of(result, name))])
    measured = "model, loop" if kind == "training" else "weights"
    limits = "limit: separate sync, fused sync"
    return ["mode", "inner optimizer", measured, "period", "bare, ms", limits, "program", "time / bare time"], rows


def print_table(run):
    """Print the steps and training steps of a run."""
    titles = {"step": "Optimizer step", "training": "Training step"}
    for kind, title in titles.items():
        header, rows = step_rows(run, kind)
        if rows:
            table = Table(*header, title=f"{title}: time divided by bare time, median and quartiles")
            for row in rows:
                table.add_row(*row)
            Console(width=None if Console().is_terminal else 160).print(table)


def markdown(header, rows):
    if not rows:
        return "Not measured.\n"
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def wide_steps(run, shape, period):
    """Return the table of one shape and period: a row for each program, a column for each inner optimizer."""
    weights, side = SHAPES[shape]
    figures = {}
    for one in of_kind(run, "step"):
        case = one["case"]
        if (case["weights"], case["side"], case["period"]) == (weights, side, period):
            for name in one["result"]:
                if name != "bare":
                    figures.setdefault((case["mode"], name), {})[case["inner"]] = shown(ratio_of(one["result"], name))
    rows = [
        [f"limit of a {kind} sync", "", *(f"{limit(one, period, kind == 'fused'):.2f}" for one in ARRAYS.values()), ""]
        for kind in ("separate", "fused")
    ]
    for (mode, name), by_inner in figures.items():
        rows.append([mode, shown_name(name), *(by_inner.get(inner, "") for inner in ARRAYS), NOTES.get(name, "")])
    return markdown(["mode", "program: time / bare time", *ARRAYS, "what it does differently"], rows)


def outer_table(run):
    """Return the table of the forms of the outer step: a row for each case, a column for each program."""
    outer = of_kind(run, "outer")
    programs = list(dict.fromkeys(name for one in outer for name in one["result"] if name != "bare"))
    rows = []
    for one in outer:
        case, result = one["case"], one["result"]
        # A sync with momentum moves six arrays. A sync without momentum moves four.
        bounds = [f"{1 + moved / (ARRAYS[case['inner']] * case['period']):.2f}" for moved in (4, 6)]
        shows = [shown(ratio_of(result, name)) if name in result else "-" for name in programs]
        rows.append([case["mode"], case["inner"], case["dtype"], str(case["period"]), ", ".join(bounds), *shows])
    header = ["mode", "inner optimizer", "dtype", "period", "limit: without, with momentum"]
    return markdown([*header, *programs], rows)


def design_table(run):
    """Return the table of designs: a row for each design, a column for each shape and inner optimizer."""
    figures = {}
    for one in of_kind(run, "design"):
        case, result = one["case"], one["result"]
        for name in result:
            if name != "bare":
                figures.setdefault((case["mode"], name), {})[what(case), case["inner"]] = shown(ratio_of(result, name))
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    rows = [
        [mode, shown_name(name), *(row.get(column, "-") for column in columns)] for (mode, name), row in figures.items()
    ]
    return markdown(["mode", "design: time / bare time", *(f"{shape} {inner}" for shape, inner in columns)], rows)


def verdict(figures, count, aim, at_least=False):
    """Return the median, the aim, and "yes", "no" or "open": whether the aim is met.

    "open" means that the aim lies in a 95% interval of the median.

    Args:
        figures: Quartiles.
        count: The number of values.
        aim: The largest acceptable median, or the smallest if `at_least` is true.
    """
    low, median, high = figures
    # Half of a 95% interval of the median. For normal values the standard error of a median is 1.253 times the standard
    # error of a mean, and the distance of the quartiles is 1.349 standard deviations: 1.96 * 1.253 / 1.349 = 1.82.
    uncertainty = 1.82 * (high - low) / math.sqrt(count)
    met = "open" if abs(median - aim) < uncertainty else "yes" if (median <= aim) != at_least else "no"
    return f"{median:.2f} / {aim:.2f} {met}"


def addons_over_ours(run):
    """Return verdicts on a step of TensorFlow Addons compared with a step of this library, by column of `aims`."""
    cells = {}
    for one in of_kind(run, "step"):
        case, result = one["case"], one["result"]
        if (
            "tensorflow_addons" in result
            and case["side"] >= 1024
            and case["period"] == 6
            and case["inner"] in ADDONS_AIMS
        ):
            seconds = [result[name]["seconds"] for name in ("tensorflow_addons", OURS)]
            figures = quartiles(ratios(*seconds))
            cells[what(case), case["inner"]] = verdict(
                figures, len(seconds[0]), ADDONS_AIMS[case["inner"]], at_least=True
            )
    return cells


def aims(run):
    """Return the table of aims for steps: a row for each program, a column for each shape and inner optimizer."""
    rows = {}
    for one in of_kind(run, "step"):
        case, result = one["case"], one["result"]
        if case["period"] == 6 and case["inner"] in LARGE_AIMS:
            for name in result:
                if name.startswith(OURS):
                    aim = (LARGE_AIMS if case["side"] >= 1024 else small_aims(case["mode"]))[case["inner"]]
                    column = what(case), case["inner"]
                    rows.setdefault(case["mode"] + form(name), {})[column] = verdict_of(result, name, aim)
    rows["TensorFlow Addons / lookahead-optim, at least"] = addons_over_ours(run)
    return verdicts(rows, [f"{weights} x {side}²" for weights, side in SHAPES.values()], LARGE_AIMS)


def small_aims(mode):
    """Return the aims for many small weights in a mode."""
    if mode in ("Keras, JAX", "Keras, TensorFlow XLA", "Optax"):
        return SMALL_AIMS["compiled by XLA"]
    return SMALL_AIMS["a graph of TensorFlow" if mode.endswith("graph") else "call by call"]


def training_aims(run):
    """Return the table of aims for training steps: a row for each program, a column for each model and optimizer."""
    rows = training_rows(run, lambda result, name: verdict_of(result, name, TRAINING_AIM))
    return verdicts(rows, MODELS, LARGE_AIMS)


def training_rows(run, figure):
    """Return `figure(result, name)` of training steps at period 6, by program, then by model and optimizer."""
    rows = {}
    for one in of_kind(run, "training"):
        case, result = one["case"], one["result"]
        if case["period"] == 6:
            for name in result:
                if name.startswith(OURS):
                    row = rows.setdefault(f"{case['mode']}, {case['loop']}{form(name)}", {})
                    row[case["model"], case["inner"]] = figure(result, name)
    return rows


def verdict_of(result, name, aim):
    return verdict(ratio_of(result, name), len(result[name]["seconds"]), aim)


def verdicts(rows, *columns):
    """Return the table of verdicts. Its last row counts them."""
    columns = [*itertools.product(*columns)]
    cells = [[label, *(row.get(column, "-") for column in columns)] for label, row in rows.items()]
    words = ("yes", "open", "no")
    met = [[row[column].split()[-1] for row in rows.values() if column in row] for column in columns]
    cells.append(
        [f"**count of {', '.join(words)}**", *(", ".join(str(one.count(word)) for word in words) for one in met)]
    )
    return markdown(["median / aim, met?", *(" ".join(column) for column in columns)], cells)


def memory(run):
    """Return the table of memory above the bare optimizer's, in copies of the weights."""
    planned = {
        one["case"]["mode"]: one["result"]
        for one in of_kind(run, "step")
        if (one["case"]["weights"], one["case"]["inner"], one["case"]["period"]) == (10, "SGD", 6)
    }
    rows = []
    for one in of_kind(run, "memory"):
        case, result = one["case"], one["result"]
        copy = case["weights"] * case["side"] ** 2 * 4
        for name in result:
            if name == "bare":
                continue
            row = [f"{(result[name][moment] - result['bare'][moment]) / copy:.2f}" for moment in ("steady", "peak")]
            plans = [planned.get(case["mode"], {}).get(program, {}).get("bytes_planned") for program in ("bare", name)]
            for index in (0, 1):
                row.append(f"{(plans[1][index] - plans[0][index]) / copy:.2f}" if all(plans) else "-")
            rows.append([case["mode"], shown_name(name), *row])
    header = ["mode", "program", "after a sync", "peak", "planned by the compiler", "temporary part of the plan"]
    return markdown(header, rows)


def graphs(run):
    """Return the table of first calls and graph sizes, for steps of small weights with SGD."""
    rows = []
    for one in of_kind(run, "step"):
        case, result = one["case"], one["result"]
        if (case["weights"], case["inner"], case["period"]) == (400, "SGD", 6):
            bare = result["bare"]
            for name, figures in result.items():
                size = str(figures["graph_size"] or "-")
                rows.append([case["mode"], shown_name(name), f"{figures['first_call']:.2f}", size])
                if bare["graph_size"]:
                    rows[-1][-1] += f" ({figures['graph_size'] / bare['graph_size']:.2f})"
    return markdown(["mode", "program", "first call, s", "operations (divided by bare)"], rows)


def extra_seconds(result):
    """Return how much longer a step takes than the bare step: the median, in seconds."""
    ours, bare = (result[name]["seconds"] for name in (OURS, "bare"))
    return statistics.median(one - other for one, other in zip(ours, bare))


def scaling_points(run, mode):
    """Return points (x, extra seconds per step) for numbers of parameters, and for numbers of weights."""
    by_size, by_number = [], []
    for one in of_kind(run, "scaling"):
        case = one["case"]
        if case["mode"] == mode:
            if case["side"] == 32:
                by_number.append((case["weights"], extra_seconds(one["result"])))
            if case["weights"] == 10:
                by_size.append((case["weights"] * case["side"] ** 2, extra_seconds(one["result"])))
    # A case that was measured twice counts once.
    return sorted(dict(by_size).items()), sorted(dict(by_number).items())


def exponent(points):
    """Return the slope of the least-squares line through the logarithms of all points with a positive `y`."""
    points = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def fitted(points):
    """Return the exponent and the number of points."""
    slope = exponent(points)
    return "-" if slope is None else f"{slope:.2f} ({sum(y > 0 for _, y in points)} points)"


def scaling(run):
    """Return the table of growth."""
    rows = []
    for mode in MODES:
        by_size, by_number = scaling_points(run, mode)
        if not by_size:
            continue
        # Weights are square, so numbers of parameters are only nearly round.
        large = [point for point in by_size if point[0] >= 0.99 * 10**6]
        largest = large[-1] if large else None
        row = [mode, fitted(large)]
        row.append(f"{largest[1] / largest[0] * 1e9:.3f}" if largest else "-")
        most = [point for point in by_number if point[0] >= 100]
        row.append(fitted(most))
        row.append(f"{most[-1][1] / most[-1][0] * 1e6:.2f} (at {most[-1][0]:,})" if most else "-")
        rows.append(row)
    header = ["mode"]
    header += ["exponent in parameters", "extra ns per parameter", "exponent in weights", "extra µs per weight"]
    return markdown(header, rows)


def reason(text):
    """Return the last line of an error, as a cell of a table."""
    return (text.strip().splitlines() or ["no error was printed"])[-1].replace("|", "\\|")


def failures(run):
    """Return the table of cases that failed, with the reason."""
    rows = []
    for one in run["results"]:
        case = one["case"]
        if "failed" in one:
            row = [case["mode"], case["kind"], case["inner"], what(case), str(case["period"]), reason(one["failed"])]
            rows.append(row)
    header = ["mode", "kind", "inner optimizer", "weights", "period", "reason"]
    return markdown(header, rows) if rows else "None.\n"


def about(run):
    """Return a text about the machine and the versions, and the table of runs."""
    machine, versions = run["machine"], {}
    for one in run["results"]:
        versions |= one.get("versions", {}) if "2.15" not in one["case"]["mode"] else {}
    old = next((one["versions"] for one in run["results"] if "2.15" in one["case"]["mode"] and "versions" in one), {})
    text = (
        f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['system'].split('-')[0]}, "
        f"Python {machine['python']}, accelerator: {machine['accelerator']}, allocator: {machine['allocator']}. "
        f"Versions: {', '.join(f'{name} {one}' for name, one in sorted(versions.items()))}"
    )
    if old:
        text += f"; for tf.keras 2.15: {', '.join(f'{name} {one}' for name, one in sorted(old.items()))}"
    threads = {name: count for one in run["results"] for name, count in one.get("threads", {}).items()}
    text += f". Threads: {', '.join(f'{name} {count}' for name, count in threads.items())}" if threads else ""
    header = ["command", "date", "commit", "system"]
    return text + "; other frameworks use their default.\n\n" + markdown(header, run["runs"])


def plot_steps(run, path):
    """Draw the ratios at period 6: a panel for each shape and inner optimizer, a bar between the quartiles."""
    from matplotlib.figure import Figure

    inners = ("SGD", "Adam")
    figure = Figure(figsize=(11, 10), layout="constrained")
    panels = figure.subplots(len(SHAPES), len(inners), squeeze=False)
    for (row, shape), (column, inner) in itertools.product(enumerate(SHAPES), enumerate(inners)):
        axes, (weights, side) = panels[row][column], SHAPES[shape]
        labels = []
        for one in of_kind(run, "step"):
            case = one["case"]
            if (case["weights"], case["side"], case["inner"], case["period"]) != (weights, side, inner, 6):
                continue
            for name in one["result"]:
                if name == "bare":
                    continue
                low, median, high = ratio_of(one["result"], name)
                mine = name.startswith(OURS)
                color = "C0" if mine else "0.5" if name.startswith("bare") else "C1"
                axes.plot([low, high], [len(labels)] * 2, color=color, linewidth=1)
                axes.plot(median, len(labels), "o" if mine else "s", color=color, markersize=4)
                labels.append(case["mode"] + form(name))
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        ticks = [1, 1.25, 1.5, 2, 3, 5, 10]
        axes.set_xticks(ticks, map(str, ticks), fontsize=8)
        axes.minorticks_off()
        axes.axvline(1, color="0.7", linewidth=0.8)
        if side >= 1024:
            axes.axvline(limit(ARRAYS[inner], 6), color="C2", linestyle="--", linewidth=1)
        axes.set_title(f"{inner}, {shape}", fontsize=9)
        axes.set_xlabel("step time / bare step time, period 6", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def plot_training(run, path):
    """Draw the ratios of training steps: a panel for each model and optimizer, a bar between the quartiles."""
    from matplotlib.figure import Figure

    columns = [*itertools.product(MODELS, LARGE_AIMS)]
    found = training_rows(run, ratio_of)
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, sharex=True), columns):
        for index, row in enumerate(found.values()):
            if column in row:
                low, median, high = row[column]
                axes.plot([low, high], [index] * 2, color="C0", linewidth=1)
                axes.plot(median, index, "o", color="C0", markersize=4)
        axes.set_yticks(range(len(found)), found, fontsize=7)
        axes.axvline(1, color="0.7", linewidth=0.8)
        axes.axvline(TRAINING_AIM, color="C2", linestyle="--", linewidth=1)
        axes.set_title(", ".join(column), fontsize=9)
        axes.set_xlabel("step time / bare time, period 6", fontsize=8)
    axes.invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def plot_scaling(run, path):
    """Draw extra seconds per step against the number of parameters and against the number of weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode in MODES:
        for axes, points in zip((left, right), scaling_points(run, mode)):
            # Noise can make a small difference negative.
            points = [(x, y) for x, y in points if y > 0]
            if points:
                axes.loglog(*zip(*points), "o-", markersize=3, linewidth=1, label=mode)
    left.set(xlabel="parameters, in ten weights", ylabel="extra seconds per step")
    right.set(xlabel="weights of 32 x 32", ylabel="extra seconds per step")
    if left.lines:
        left.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def write(run, folder, names=None):
    """Write tables and plots into a folder: all of them, or the tables in `names`."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "about": about(run),
        "large": wide_steps(run, "10 x 1024²", 6),
        "small": wide_steps(run, "400 x 32²", 6),
        "every_step": markdown(*step_rows(run)),
        "aims": aims(run),
        "training_aims": training_aims(run),
        "training": markdown(*step_rows(run, "training")),
        "designs": design_table(run),
        "outer": outer_table(run),
        "memory": memory(run),
        "graphs": graphs(run),
        "scaling": scaling(run),
        "failures": failures(run),
    }
    for name, text in tables.items():
        if names is None or name in names:
            (folder / f"{name}.md").write_text(text)
    # Text stays text in the SVG, so that a diff shows which figure changed.
    with mpl.rc_context({"svg.hashsalt": "lookahead-optim", "svg.fonttype": "none"}):
        if names is None:
            plot_steps(run, folder / "steps.svg")
            plot_training(run, folder / "training.svg")
        if of_kind(run, "scaling"):
            plot_scaling(run, folder / "scaling.svg")


def by_machine(runs):
    """Return one merged run for each machine, the machine of the last run first.

    Times of two machines do not belong in one table.
    """
    groups = {}
    for run in reversed(runs):
        hardware = tuple(run["machine"][name] for name in ("processor", "cores", "accelerator"))
        groups.setdefault(hardware, []).insert(0, run)
    return [merged(group) for group in groups.values()]


def key(case):
    """Return a key that is the same for two measurements of one case, with any number of cycles."""
    told = {name: value for name, value in case.items() if name not in ("cycles", "placements")}
    # Older results have no dtype.
    return json.dumps(told | {"dtype": told.get("dtype", "float32")})


def merged(runs):
    """Return several runs as one. The last result of a case counts, and cases are in the order of the suite."""
    results = dict.fromkeys(key(dataclasses.asdict(case)) for case in full())
    for run in runs:
        results |= {key(one["case"]): one for one in run["results"]}
    about = [[f"`{run['command']}`", run["date"], run["commit"], run["machine"]["system"]] for run in runs]
    return {**runs[-1], "runs": about, "results": sorted(filter(None, results.values()), key=_is_design_of)}


def _is_design_of(one):
    """Return a sort key that puts designs last, by mode. The suite no longer has designs."""
    case = one["case"]
    return [*MODES].index(case["mode"]) if case["kind"] == "design" else -1


def read(paths):
    """Return the runs in the files, the oldest first."""
    runs = itertools.chain.from_iterable(json.loads(path.read_text()) for path in paths)
    return sorted(runs, key=lambda run: (run["date"], run["time"]))


def written(runs, by_line="results"):
    """Return runs as JSON, with one line for each element of the entry `by_line` of a run."""
    texts = []
    for run in runs:
        elements = ",\n".join(json.dumps(one, separators=(",", ":")) for one in run[by_line])
        about = json.dumps({key: value for key, value in run.items() if key != by_line}, separators=(",", ":"))
        texts.append(f'{about[:-1]},"{by_line}":[\n{elements}\n]}}')
    return "[" + ",\n".join(texts) + "]\n"


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write Markdown tables and SVG plots.")],
    results: Annotated[list[Path], typer.Argument(help="JSON files of `run.py`.", exists=True)],
) -> None:
    """Make tables and plots of results. Earlier machines have subfolders; the last run's machine has the folder."""
    last, *others = by_machine(read(results))
    write(last, folder)
    for number, run in enumerate(others, start=1):
        write(run, folder / f"earlier{number}", EARLIER)


if __name__ == "__main__":
    typer.run(main)
