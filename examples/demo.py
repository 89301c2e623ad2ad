"""A demo on scanned digits: what Lookahead gains, what it does not, and that training resumes exactly.

Run `make demo`, or `python examples/demo.py --help` where its dependencies are installed.
"""

import enum
import json
import math
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from lookahead_optim import __version__

try:
    import numpy as np
    import typer
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if find_spec("keras") is None:
        raise ModuleNotFoundError("No module named 'keras'")
except ImportError as error:
    message = f"The demo needs more than is installed ({error}). Run: make demo"
    raise SystemExit(message) from error

# With batches of 32 the slow weights end no better than the bare optimizer under 30% noise: 88.5 ± 2.5, 88.3 ± 2.3.
BATCH_SIZE = 64
# Full batches only, so that one shape is compiled. With a multiple of the sync period every epoch would end on a sync,
# where fast and slow weights are the same.
STEPS_PER_EPOCH = 22

Curves = dict[str, np.ndarray]


class Backend(str, enum.Enum):
    """The Keras backends that train."""

    jax = "jax"
    tensorflow = "tensorflow"
    torch = "torch"


def load_data() -> list[np.ndarray]:
    """Return training and test images, of shape (images, 64) with values from 0 to 1, then their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    return train_test_split(images, labels, train_size=STEPS_PER_EPOCH * BATCH_SIZE, stratify=labels, random_state=0)


def add_label_noise(labels: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Return the labels with a share `noise` of them replaced by random ones, which may be right by chance."""
    generator = np.random.default_rng(seed)
    replaced = generator.permutation(len(labels))[: round(noise * len(labels))]
    noisy = labels.copy()
    noisy[replaced] = generator.integers(0, 10, len(replaced))
    return noisy


def make_inner_optimizer(name: str, learning_rate: float | None) -> Any:
    """Return a new Keras optimizer. A learning rate of None means 0.1 for SGD, else the optimizer's own."""
    import keras

    optimizer = keras.optimizers.get(keras.optimizers.SGD(momentum=0.9) if name == "momentum" else name)
    if learning_rate is None and isinstance(optimizer, keras.optimizers.SGD):
        learning_rate = 0.1
    if learning_rate is not None:
        optimizer.learning_rate = learning_rate
    return optimizer


def train(
    optimizer: Any, data: list[np.ndarray], epochs: int, seed: int, end_epoch: Callable[[], object]
) -> tuple[Any, dict[str, Any]]:
    """Train a new network; return it with its test accuracies in % after each epoch, by the weights evaluated."""
    import keras

    from lookahead_optim.keras import Lookahead

    keras.utils.set_random_seed(seed)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((64,)), dense(128, activation="relu"), dense(64, activation="relu"), dense(10)]
    )
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x_train, x_test, y_train, y_test = data
    wrapped = isinstance(optimizer, Lookahead)
    curves: dict[str, list[float]] = {"fast": [], "slow": []} if wrapped else {"bare": []}

    def test_accuracy() -> float:
        # `evaluate` would draw random numbers on PyTorch, and so change the order of the training data.
        return 100 * float(np.mean(model.predict_on_batch(x_test).argmax(axis=-1) == y_test))

    def on_epoch_end(epoch: int, logs: dict[str, float]) -> None:
        curves["fast" if wrapped else "bare"].append(test_accuracy())
        if wrapped:
            with optimizer.slow_weights():
                curves["slow"].append(test_accuracy())
        end_epoch()

    callback = keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)
    model.fit(x_train, y_train, batch_size=BATCH_SIZE, epochs=epochs, callbacks=[callback], verbose=0)
    return model, curves


def compare(options: dict[str, Any], console: Console) -> tuple[dict[str, Curves], Any, list[np.ndarray]]:
    """Train bare and wrapped, on noisy and clean labels, once per seed and otherwise alike.

    Returns:
        The test accuracies in % by training labels and by weights evaluated, as arrays of shape (seeds, epochs); the
        last wrapped model; the data it was trained on.
    """
    from lookahead_optim.keras import Lookahead

    def inner() -> Any:
        return make_inner_optimizer(options["inner"], options["learning_rate"])

    x_train, x_test, y_train, y_test = load_data()
    noisy = {f"{100 * options['noise']:g}% label noise": options["noise"]} if options["noise"] else {}
    results = {}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, elapsed")]
    columns += [TimeElapsedColumn(), TextColumn("remaining"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=(len(noisy) + 1) * 2 * options["seeds"] * options["epochs"])
        for condition, noise in {**noisy, "clean labels": 0.0}.items():
            runs: dict[str, list[Any]] = {"bare": [], "fast": [], "slow": []}
            for seed in range(options["seeds"]):
                progress.update(task, description=f"{condition}, seed {seed + 1}")
                data = [x_train, x_test, add_label_noise(y_train, noise, seed), y_test]
                for optimizer in (inner(), Lookahead(inner(), options["sync_period"], options["slow_step_size"])):
                    model, curves = train(
                        optimizer, data, options["epochs"], seed, end_epoch=lambda: progress.advance(task)
                    )
                    for name, curve in curves.items():
                        runs[name].append(curve)
            results[condition] = {name: np.array(curves) for name, curves in runs.items()}
    return results, model, data


def resume(model: Any, x: np.ndarray, y: np.ndarray, path: Path) -> tuple[str, dict[str, bool]]:
    """Save the model in mid-cycle, load it, and train on with both.

    Returns:
        What was done, in words, and for each part of the two models whether it is equal bit for bit.
    """
    import keras

    optimizer, period = model.optimizer, model.optimizer.sync_period
    if optimizer.iterations % period == 0:
        model.fit(x[:BATCH_SIZE], y[:BATCH_SIZE], batch_size=BATCH_SIZE, verbose=0)
    saved = int(optimizer.iterations)
    model.save(path)
    loaded = keras.models.load_model(path)
    for one in (model, loaded):
        one.fit(x, y, batch_size=BATCH_SIZE, shuffle=False, verbose=0)

    def equal(variables: list[Any], others: list[Any]) -> bool:
        pairs = zip(variables, others, strict=True)
        return all(np.asarray(one.numpy()).tobytes() == np.asarray(other.numpy()).tobytes() for one, other in pairs)

    text = (
        f"Saved at update {saved}, {saved % period} after a sync, and loaded. Trained on, from memory and from file, "
    )
    return text + f"to updates {int(optimizer.iterations)} and {int(loaded.optimizer.iterations)}:", {
        "weights": equal(model.weights, loaded.weights),
        "slow weights": equal(optimizer.slow_variables, loaded.optimizer.slow_variables),
        "optimizer variables": equal(optimizer.variables, loaded.optimizer.variables),
    }


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def verdict(bare: np.ndarray, wrapped: np.ndarray) -> str:
    """Say whether Lookahead helped, from two arrays of test accuracies in %, one per seed."""
    (bare_mean, bare_spread), (wrapped_mean, wrapped_spread) = mean_and_spread(bare), mean_and_spread(wrapped)
    difference, spread = wrapped_mean - bare_mean, max(bare_spread, wrapped_spread)
    if difference == 0:
        return "Lookahead made no difference: it did not help."
    text = f"Lookahead was {abs(difference):.1f} points {'better' if difference > 0 else 'worse'}"
    if len(bare) == 1:
        return f"{text}, in one run each, which may be chance."
    if abs(difference) <= spread:
        return f"{text}, within the spread over seeds ({spread:.1f}): no clear difference."
    outcome = "it helped" if difference > 0 else "it did not help"
    return f"{text}, more than the spread over seeds ({spread:.1f}): {outcome}."


def make_table(results: dict[str, Curves]) -> Table:
    """Return the test accuracies after the last epoch as a table."""
    table = Table("Training labels", title="Test accuracy in %, mean ± standard deviation over seeds")
    for heading in ("Bare", "Lookahead, fast", "Lookahead, slow"):
        table.add_column(heading, justify="right")
    for condition, curves in results.items():
        cells = [mean_and_spread(curves[name][:, -1]) for name in ("bare", "fast", "slow")]
        table.add_row(condition, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells))
    return table


def plot(results: dict[str, Curves], title: str, path: Path) -> None:
    """Save the test accuracies over the epochs, one panel for each kind of training labels."""
    styles = {
        "bare": ("Bare inner optimizer", "#D55E00", "-"),
        "fast": ("Lookahead, fast weights", "#56B4E9", "--"),
        "slow": ("Lookahead, slow weights", "#0072B2", "-"),
    }
    figure = Figure(figsize=(5.5 * len(results), 4.8), layout="constrained")
    for axes, (condition, curves) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for name, (label, color, line) in styles.items():
            epochs = np.arange(1, curves[name].shape[1] + 1)
            mean, spread = np.transpose([mean_and_spread(accuracies) for accuracies in curves[name].T])
            axes.plot(epochs, mean, line, color=color, label=label, marker="." if len(epochs) == 1 else "")
            axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axes.set(title=condition.capitalize(), xlabel=f"Epochs ({STEPS_PER_EPOCH} updates each)")
        axes.set(ylabel="Test accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def save_results(path: Path, options: dict[str, Any], results: dict[str, Curves], **more: Any) -> None:
    """Save options, versions and all test accuracies in % as JSON."""
    modules = ("keras", options["backend"], "numpy", "sklearn")
    versions = {"lookahead_optim": __version__} | {name: import_module(name).__version__ for name in modules}
    accuracy = {key: {name: curve.tolist() for name, curve in curves.items()} for key, curves in results.items()}
    content = {"options": options, "versions": versions, "test_accuracy": accuracy, **more}
    path.write_text(json.dumps(content, indent=2) + "\n")


def prepare(options: dict[str, Any]) -> None:
    """Start Keras, settle the learning rate and make the output folder, refusing options that do not work."""
    backend = options["backend"]
    os.environ["KERAS_BACKEND"] = backend
    try:
        import keras  # noqa: F401
    except ImportError as error:
        text = f"Keras cannot start on {backend} ({error}). Run: pip install {backend}"
        raise typer.BadParameter(text, param_hint="'--backend'") from error
    try:
        optimizer = make_inner_optimizer(options["inner"], options["learning_rate"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{options['inner']!r} is not momentum or a Keras optimizer's name, such as sgd, adam, adamw or rmsprop."
        raise typer.BadParameter(text, param_hint="'--inner'") from error
    options["learning_rate"] = float(f"{float(optimizer.learning_rate):.6g}")
    updates = options["epochs"] * STEPS_PER_EPOCH
    if options["sync_period"] > updates:
        text = f"{options['sync_period']} is longer than the run of {updates} updates, which would never synchronise."
        raise typer.BadParameter(text, param_hint="'--sync-period'")
    try:
        Path(options["output"]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"The folder cannot be made: {error}", param_hint="'--output'") from error


def finite(value: float) -> float:
    """Refuse infinity, and NaN where the range of an option does not do so."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite.")
    return value


def finite_or_none(value: float | None) -> float | None:
    return None if value is None else finite(value)


def at_most_1(slow_step_size: float) -> float:
    """Refuse over-relaxation, and what is not finite."""
    if finite(slow_step_size) > 1:
        raise typer.BadParameter(
            f"{slow_step_size:g} is above 1: the slow weights would go beyond the fast ones. Usual are 0.5 to 0.8."
        )
    return slow_step_size


INNER = "Inner optimizer: sgd, adam, adamw, rmsprop or another of Keras; momentum is SGD with momentum 0.9."
LEARNING_RATE = "The inner optimizer's learning rate, constant."
LEARNING_RATES = "0.1 for sgd and momentum, else the optimizer's own"
STEP_SIZE = "The part of the way to the fast weights that the slow ones go at a synchronisation (alpha), 0 to 1."
NOISE = "Share of the training labels to replace by random ones."


def main(
    context: typer.Context,
    inner: Annotated[str, typer.Option(help=INNER)] = "momentum",
    learning_rate: Annotated[
        float | None, typer.Option(help=LEARNING_RATE, min=0, callback=finite_or_none, show_default=LEARNING_RATES)
    ] = None,
    sync_period: Annotated[int, typer.Option(help="Updates between synchronisations (k).", min=1)] = 5,
    slow_step_size: Annotated[float, typer.Option(help=STEP_SIZE, min=0, callback=at_most_1)] = 0.5,
    noise: Annotated[float, typer.Option(help=NOISE, min=0, max=1, callback=finite)] = 0.3,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.", min=1)] = 28,
    seeds: Annotated[int, typer.Option(help="Runs of each kind.", min=1)] = 5,
    backend: Annotated[Backend, typer.Option(help="What Keras runs on.", envvar="KERAS_BACKEND")] = Backend.jax,
    output: Annotated[Path, typer.Option(help="Folder for the numbers, plot and model.")] = Path("demo-output"),
) -> None:
    """Train a small network on scanned digits with an optimizer bare and wrapped in Lookahead, and compare."""
    options = context.params | {"backend": backend.value, "output": str(output)}
    prepare(options)
    console = Console(markup=False, highlight=False)
    rate = f"{options['learning_rate']:g}"
    setting = f"{inner}, learning rate {rate}, bare and in Lookahead({sync_period}, {slow_step_size})"
    console.print(f"Scanned digits: {setting}. Keras on {backend.value}.")
    results, model, (x_train, _, y_train, _) = compare(options, console)
    console.print(make_table(results))
    verdicts = {
        f"{condition}, {name} weights": verdict(curves["bare"][:, -1], curves[name][:, -1])
        for condition, curves in results.items()
        for name in ("fast", "slow")
    }
    for case, text in verdicts.items():
        console.print(f"{case.capitalize()}: {text}")
    after = epochs * STEPS_PER_EPOCH % sync_period
    console.print(f"Updates since the last sync: {after}{'' if after else ' (fast and slow weights are the same)'}.")
    console.print(
        "The inner learning rate is constant, and the same on both sides. A gain can shrink or vanish under a tuned and"
        " decayed one, or with another batch size."
    )
    resumed, equal = resume(model, x_train, y_train, output / "wrapped.keras")
    console.print(resumed)
    for part, is_equal in equal.items():
        console.print(f"  {part}: {'equal bit for bit' if is_equal else 'DIFFERENT'}")
    plot(results, f"Scanned digits: {setting}\nmean and standard deviation over {seeds} seed(s)", output / "curves.png")
    save_results(output / "results.json", options, results, verdicts=verdicts, resumed_exactly=equal)
    for label, file in {"Plot": "curves.png", "Numbers": "results.json", "Model": "wrapped.keras"}.items():
        console.print(f"{label}: {output / file}", soft_wrap=True)
    if not all(equal.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
