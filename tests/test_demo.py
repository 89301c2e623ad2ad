import json
import os
import re
import subprocess
import sys

import keras
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import demo as program
from demo import add_label_noise, verdict
from lookahead_optim.keras import Lookahead

PROGRAM = program.__file__
OPTIONS = ["inner", "learning-rate", "sync-period", "slow-step-size", "noise", "epochs", "seeds", "backend", "output"]
ENVIRONMENT = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1", "KERAS_BACKEND": keras.config.backend()}


def run(*arguments, code=None):
    """Run the demo, or the Python `code`, in a process of its own."""
    start = [PROGRAM] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)


def run_here(*arguments):
    """Run the demo in this process, which starts faster than a new process."""
    app = typer.Typer(add_completion=False)
    app.command()(program.main)
    return CliRunner().invoke(app, [str(one) for one in ("--epochs", 1, "--seeds", 1, *arguments)], env=ENVIRONMENT)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = run("--epochs", 2, "--seeds", 2, "--noise", 0.5, "--backend", "jax", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "results.json").read_text())


def test_table_and_verdicts_follow_from_the_numbers_in_the_json(demo):
    _, stdout, results = demo
    assert list(results["test_accuracy"]) == ["50% label noise", "clean labels"]
    for condition, curves in results["test_accuracy"].items():
        assert list(curves) == ["bare", "fast", "slow"]
        curves = {name: np.array(curve) for name, curve in curves.items()}
        assert all(curve.shape == (2, 2) and 10 < curve.min() < curve.max() <= 100 for curve in curves.values())
        cells = [f"{curve[:, -1].mean():.1f} ± {curve[:, -1].std(ddof=1):.1f}" for curve in curves.values()]
        (row,) = [line for line in stdout.splitlines() if condition in line and "│" in line]
        assert [cell.strip() for cell in row.strip("│ ").split("│")] == [condition, *cells]
        for name in ("fast", "slow"):
            text = verdict(curves["bare"][:, -1], curves[name][:, -1])
            assert results["verdicts"][f"{condition}, {name} weights"] == text
            assert f"{condition}, {name} weights: {text}".lower() in stdout.lower()


def test_json_has_every_option_and_the_versions(demo):
    folder, _, results = demo
    assert results["options"] == {
        "inner": "momentum",
        "learning_rate": 0.1,
        "sync_period": 5,
        "slow_step_size": 0.5,
        "noise": 0.5,
        "epochs": 2,
        "seeds": 2,
        "backend": "jax",
        "output": str(folder),
    }
    assert set(results["versions"]) == {"lookahead_optim", "keras", "jax", "numpy", "sklearn"}


def test_plot_is_an_image_with_a_curve_in_each_color(demo):
    folder, stdout, _ = demo
    assert f"Plot: {folder / 'curves.png'}" in stdout
    image = matplotlib.image.imread(folder / "curves.png")
    assert image.shape[0] >= 500
    assert image.shape[1] >= 1000
    for color in ("#D55E00", "#56B4E9", "#0072B2"):
        distance = np.abs(image[..., :3] - matplotlib.colors.to_rgb(color)).max(axis=-1)
        assert np.sum(distance < 0.02) > 1000, color


def test_saved_model_loads_in_another_process_in_mid_cycle_with_slow_weights_of_its_own(demo):
    folder, stdout, _ = demo
    assert f"Model: {folder / 'wrapped.keras'}" in stdout
    assert "Saved at update 44, 4 after a sync" in stdout
    model = keras.models.load_model(folder / "wrapped.keras")
    assert int(model.optimizer.iterations) == 44
    for fast, slow in zip(model.trainable_variables, model.optimizer.slow_variables, strict=True):
        assert (fast.numpy() != slow.numpy()).any()


def test_resume_is_exact(demo):
    _, stdout, results = demo
    assert "to updates 66 and 66" in stdout
    assert results["resumed_exactly"] == {"weights": True, "slow weights": True, "optimizer variables": True}
    assert stdout.count("equal bit for bit") == 3


def test_inexact_resume_is_reported_and_ends_with_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(Lookahead, "load_own_variables", lambda self, store: None)
    done = run_here("--noise", 0, "--output", tmp_path)
    assert done.exit_code == 1
    assert "slow weights: DIFFERENT" in done.output
    assert json.loads((tmp_path / "results.json").read_text())["resumed_exactly"]["slow weights"] is False


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_bare_and_wrapped_runs_differ_in_nothing_but_lookahead(tmp_path, backend):
    options = ("--epochs", 2, "--seeds", 1, "--noise", 0, "--slow-step-size", 1, "--backend", backend)
    done = run(*options, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (curves,) = json.loads((tmp_path / "results.json").read_text())["test_accuracy"].values()
    assert curves["bare"] == curves["fast"] != curves["slow"]


def test_help_lists_every_option_with_its_default():
    done = run("--help")
    assert done.returncode == 0
    for option in OPTIONS:
        (line,) = [line for line in done.stdout.splitlines() if re.search(rf"--{option}\b", line)]
        assert "default: " in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("inner", "steepest"),
        ("inner", "LossScaleOptimizer"),
        ("learning-rate", "-0.1"),
        ("learning-rate", "nan"),
        ("sync-period", "0"),
        ("sync-period", "2.5"),
        # One epoch has 22 updates.
        ("sync-period", "23"),
        ("slow-step-size", "-1"),
        ("slow-step-size", "inf"),
        ("slow-step-size", "nan"),
        ("slow-step-size", "3"),
        ("noise", "-0.1"),
        ("noise", "1.1"),
        ("noise", "nan"),
        ("epochs", "0"),
        ("seeds", "0"),
        ("backend", "numpy"),
        ("output", __file__),
    ],
)
def test_bad_option_is_refused_by_its_name_before_training(tmp_path, option, value):
    done = run_here("--output", tmp_path / "none", f"--{option}", value)
    assert done.exit_code == 2, done.output
    assert f"Invalid value for '--{option}'" in done.output
    assert "Test accuracy" not in done.output
    assert not (tmp_path / "none" / "results.json").exists()


def test_backend_that_is_not_installed_is_named(tmp_path):
    hide = f"import runpy, sys; sys.modules['jax'] = None; runpy.run_path({PROGRAM!r}, run_name='__main__')"
    done = run("--backend", "jax", "--output", tmp_path, code=hide)
    assert done.returncode == 2
    assert "Invalid value for '--backend'" in done.stderr
    assert "pip install jax" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["keras", "matplotlib", "rich", "sklearn", "typer"])
def test_missing_dependency_says_what_to_install(name):
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == {name!r} else find_spec(name)
sys.modules[{name!r}] = None
runpy.run_path({PROGRAM!r}, run_name="__main__")
"""
    done = run(code=code)
    assert done.returncode == 1
    assert name in done.stderr
    assert "Run: make demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("bare", "wrapped", "text"),
    [
        ([87, 88, 89], [91.8, 92.2, 92.6], "4.2 points better, more than the spread over seeds (1.0): it helped."),
        (
            [98.3, 98.4, 98.5],
            [98, 98.1, 98.2],
            "0.3 points worse, more than the spread over seeds (0.1): it did not help.",
        ),
        (
            [98, 98.5, 99],
            [98.3, 98.7, 99.1],
            "0.2 points better, within the spread over seeds (0.5): no clear difference.",
        ),
        (
            [98.7, 98.8, 98.9],
            [98, 98.6, 99.2],
            "0.2 points worse, within the spread over seeds (0.6): no clear difference.",
        ),
        ([98, 99], [99, 98], "made no difference: it did not help."),
        ([88], [92], "4.0 points better, in one run each, which may be chance."),
    ],
)
def test_verdict_compares_the_difference_with_the_spread(bare, wrapped, text):
    assert verdict(np.array(bare), np.array(wrapped)).endswith(text)


def test_label_noise_replaces_the_share_asked_for_reproducibly():
    labels = np.arange(10_000) % 10
    noisy = add_label_noise(labels, 0.3, seed=0)
    assert np.mean(noisy != labels) == pytest.approx(0.3 * 0.9, abs=0.01)
    np.testing.assert_array_equal(noisy, add_label_noise(labels, 0.3, seed=0))
    assert (noisy != add_label_noise(labels, 0.3, seed=1)).any()
    np.testing.assert_array_equal(labels, add_label_noise(labels, 0, seed=0))
    np.testing.assert_array_equal(labels, np.arange(10_000) % 10)
