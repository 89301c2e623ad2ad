"""A demo of Lookahead on scanned digits: what it gains, what it does not, and that it resumes exactly.

Run `python -m lookahead_optim.demo --help`.
"""

import enum
import json
import math
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from lookahead_optim import __version__
from lookahead_optim._checks import check_slow_step_size

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

    metadata.version("keras")
except ImportError as error:
    message = f"The demo needs more than is installed ({error}). Run: pip install lookahead-optim[demo]"
    raise (SystemExit(message) if __name__ == "__main__" else ImportError(message)) from error

BATCH_SIZE = 32
# Full batches only, so that one shape is compiled. Their number is not a multiple of the usual sync periods: if it
# were, every epoch would end on a sync, where fast and slow weights are the same.
STEPS_PER_EPOCH = 44

Curves = dict[str, np.ndarray]
Split = tuple[np.ndarray, np.ndarray]


class Backend(str, enum.Enum):
    """The Keras backends that train."""

    jax = "jax"
    tensorflow = "tensorflow"
    torch = "torch"


def load_data() -> tuple[Split, Split]:
    """Return training and test images of shape (images, 64) with values from 0 to 1, each with its labels."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / 16).astype("float32"),
        labels,
        train_size=STEPS_PER_EPOCH * BATCH_SIZE,
        stratify=labels,
        random_state=0,
    )
    return (x_train, y_train), (x_test, y_test)


def add_label_noise(labels: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Return the labels with a share `noise` of them replaced by random ones, which may be right by chance."""
    generator = np.random.default_rng(seed)
    replaced = generator.permutation(len(labels))[: round(noise * len(labels))]
    noisy = labels.copy()
    noisy[replaced] = generator.integers(0, 10, len(replaced))
    return noisy


def make_inner_optimizer(name: str, learning_rate: float | None) -> Any:
    """Return a new Keras optimizer, with its own default learning rate for None (0.1 for SGD)."""
    import keras

    if name.lower() == "momentum":
        optimizer = keras.optimizers.SGD(momentum=0.9)
    else:
        optimizer = keras.optimizers.get(name)
    if learning_rate is None and isinstance(optimizer, keras.optimizers.SGD):
        learning_rate = 0.1
    if learning_rate is not None:
        optimizer.learning_rate = learning_rate
    return optimizer


def train(optimizer: Any, train_data: Split, test_data: Split, epochs: int, seed: int, advance: Callable) -> tuple:
    """Train a new network; return it, and its test accuracies in % after each epoch, by the weights evaluated."""
    import keras

    from lookahead_optim.keras import Lookahead

    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    x_test, y_test = test_data
    slow = []

    def end_epoch(epoch: int, logs: dict) -> None:
        if isinstance(optimizer, Lookahead):
            with optimizer.slow_weights():
                logs = model.evaluate(x_test, y_test, batch_size=len(y_test), verbose=0, return_dict=True)
            slow.append(100 * logs["accuracy"])
        advance()

    history = model.fit(
        *train_data,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=test_data,
        validation_batch_size=len(y_test),
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=end_epoch)],
        verbose=0,
    )
    trained = [100 * accuracy for accuracy in history.history["val_accuracy"]]
    return model, {"fast": trained, "slow": slow} if slow else {"bare": trained}


def compare(options: dict[str, Any], console: Console) -> tuple[dict[str, Curves], Any, Split]:
    """Train bare and wrapped, on noisy and clean labels, once per seed and otherwise alike.

    Returns:
        The test accuracies in % by training labels and by weights evaluated, arrays of shape (seeds, epochs); then
        the last wrapped model and the data it was trained on.
    """
    from lookahead_optim.keras import Lookahead

    def inner() -> Any:
        return make_inner_optimizer(options["inner"], options["learning_rate"])

    def wrapped() -> Any:
        return Lookahead(inner(), options["sync_period"], options["slow_step_size"])

    (x_train, y_train), test_data = load_data()
    conditions = {"clean labels": 0.0}
    if options["noise"]:
        conditions = {f"{100 * options['noise']:g}% label noise": options["noise"]} | conditions
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, elapsed")]
    columns += [TimeElapsedColumn(), TextColumn("remaining"), TimeRemainingColumn()]
    results = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Training", total=len(conditions) * 2 * options["seeds"] * options["epochs"])
        for condition, noise in conditions.items():
            runs: dict[str, list] = {"bare": [], "fast": [], "slow": []}
            for seed in range(options["seeds"]):
                train_data = x_train, add_label_noise(y_train, noise, seed)
                for make in (inner, wrapped):
                    model, curves = train(
                        make(), train_data, test_data, options["epochs"], seed, lambda: progress.advance(task)
                    )
                    for name, curve in curves.items():
                        runs[name].append(curve)
            results[condition] = {name: np.array(curve) for name, curve in runs.items()}
    return results, model, train_data


def resume(model: Any, train_data: Split, path: Path) -> tuple[str, dict[str, bool]]:
    """Save the model in mid-cycle, load it, and train on with both.

    Returns:
        What was done, in words, and for each part of the two models whether it is equal bit for bit.
    """
    import keras

    x, y = train_data
    optimizer = model.optimizer
    if optimizer.iterations % optimizer.sync_period == 0:
        model.fit(x[:BATCH_SIZE], y[:BATCH_SIZE], batch_size=BATCH_SIZE, verbose=0)
    saved_after = int(optimizer.iterations)
    model.save(path)
    loaded = keras.models.load_model(path)
    for one in (model, loaded):
        one.fit(x, y, batch_size=BATCH_SIZE, shuffle=False, verbose=0)

    def same(ours: list, theirs: list) -> bool:
        values = [[keras.ops.convert_to_numpy(one).tobytes() for one in variables] for variables in (ours, theirs)]
        return values[0] == values[1]

    equal = {
        "weights": same(model.weights, loaded.weights),
        "slow weights": same(optimizer.slow_variables, loaded.optimizer.slow_variables),
        "optimizer variables": same(optimizer.variables, loaded.optimizer.variables),
    }
    text = (
        f"Saved after update {saved_after}, {saved_after % optimizer.sync_period} after a sync, loaded, and trained on: "
        f"the model in memory to update {int(optimizer.iterations)}, the loaded one to {int(loaded.optimizer.iterations)}."
    )
    return text, equal


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def verdict(bare: np.ndarray, wrapped: np.ndarray) -> str:
    """Say whether Lookahead helped, from the two test accuracies in % for each seed."""
    mean, spread = mean_and_spread(np.asarray(wrapped) - np.asarray(bare))
    text = f"Lookahead was {abs(mean):.1f} points {'better' if mean > 0 else 'worse'}"
    if not np.any(np.asarray(wrapped) != np.asarray(bare)):
        return "Lookahead made no difference: it did not help."
    if len(bare) == 1:
        return f"{text}, with one seed only: that may be chance."
    text = f"{text} (± {spread:.1f} from seed to seed)"
    if abs(mean) <= spread:
        return f"{text}, within the spread: no clear difference."
    return f"{text}: it {'helped' if mean > 0 else 'did not help'}."


def make_table(results: dict[str, Curves], seeds: int) -> Table:
    """Return the test accuracies after the last epoch as a table."""
    table = Table(title=f"Test accuracy in % after the last epoch, mean ± standard deviation over {seeds} seed(s)")
    for heading in ("Training labels", "Bare", "Lookahead, fast weights", "Lookahead, slow weights"):
        table.add_column(heading, justify="left" if heading == "Training labels" else "right")
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
    figure = Figure(figsize=(5.5 * len(results), 4.6), layout="constrained")
    for axes, (condition, curves) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        for name, (label, color, line) in styles.items():
            epochs = np.arange(1, curves[name].shape[1] + 1)
            mean, spread = np.transpose([mean_and_spread(accuracies) for accuracies in curves[name].T])
            axes.plot(epochs, mean, line, color=color, label=label, marker="." if len(epochs) == 1 else "")
            axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axes.set(title=condition.capitalize(), xlabel="Epoch", ylabel="Test accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def check_learning_rate(value: float | None) -> float | None:
    """Refuse a learning rate that cannot train."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a finite number > 0.")
    return value


def check_step_size(value: float) -> float:
    """Refuse what `Lookahead` refuses."""
    try:
        return check_slow_step_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def check_noise(value: float) -> float:
    """Refuse what is not a share, also NaN, which typer's own range lets through."""
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not a share from 0 to 1.")
    return value


def prepare(options: dict[str, Any]) -> None:
    """Start Keras on the chosen backend, make the output folder, and find out early what is wrong with them."""
    backend, output = options["backend"], Path(options["output"])
    os.environ["KERAS_BACKEND"] = backend
    try:
        import keras  # noqa: F401
    except ImportError as error:
        raise typer.BadParameter(
            f"Keras cannot start on {backend} ({error}). Run: pip install {backend}", param_hint="--backend"
        ) from error
    try:
        make_inner_optimizer(options["inner"], options["learning_rate"])
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"{options['inner']!r} is not momentum or a name of a Keras optimizer, such as sgd, adam, adamw or rmsprop.",
            param_hint="--inner",
        ) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"The folder cannot be made: {error}", param_hint="--output") from error
