"""Every experiment runs, agrees with its closed form, and its committed tables are made of its committed results."""

import importlib
import itertools
import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import schedulefree
import torch
import typer
from torch.optim import swa_utils
from typer.testing import CliRunner

import cifar
import common
from lookahead_optim.torch import Lookahead

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments"

NAMES = [
    "noisy_quadratic",
    "deterministic_quadratic",
    "bilinear_game",
    "outer_step",
    "inner_moments",
    "communication",
    "digits",
    "label_noise",
    "characters",
    "loss_surface",
]


def run_script(name, *arguments):
    """Run an experiment as its users do, and return what it printed."""
    found = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return a function that runs an experiment once, in its quick form, and returns its folder."""
    folder = tmp_path_factory.mktemp("quick")

    def run(name):
        if not (folder / f"{name}.json").exists():
            run_script(name, "--quick", "--output", folder, "--drawn", folder)
        return folder

    return run


@pytest.mark.parametrize("name", NAMES)
def test_quick_runs_write_results_and_draw_them(quick, name):
    folder = quick(name)
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["experiment"] == name
    assert content["command"].endswith(f"{name}.py --quick")
    assert list(folder.glob(f"{name}_*.svg"))


@pytest.mark.parametrize("name", [*NAMES, "cifar"])
def test_every_experiment_has_help(name, monkeypatch, capsys):
    path = str(FOLDER / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


def results_of(quick, name):
    return json.loads((quick(name) / f"{name}.json").read_text())["results"]


def test_variances_and_losses_of_the_noisy_quadratic_are_the_closed_forms(quick):
    results = results_of(quick, "noisy_quadratic")
    for one in results["variances"]:
        assert one["slow"] == pytest.approx(one["slow_expected"], rel=0.02)
        assert one["fast"] == pytest.approx(one["fast_expected"], rel=0.02)
    assert results["variances"][0]["slow_expected"] == pytest.approx(0.442973, abs=1e-6)
    for curve in results["curves"]["curves"].values():
        np.testing.assert_allclose(curve["measured"], curve["expected"], rtol=0.05)


def test_rates_on_the_deterministic_quadratic_are_the_spectral_radius(quick):
    module = importlib.import_module("deterministic_quadratic")
    # v <- 0.9 v + x, x <- x - 0.3 v.
    assert module.rates(0.3, 0.9, 5, np.ones(1))[0] == pytest.approx(0.9179757811, abs=1e-10)
    assert module.rates(0.3, 0.9, 0, np.ones(1))[0] == pytest.approx(0.9486832981, abs=1e-10)
    for one in results_of(quick, "deterministic_quadratic"):
        assert np.log(one["measured"]) == pytest.approx(np.log(one["rate"]), rel=0.1)


def test_the_bilinear_game_grows_as_its_closed_form(quick):
    rates = {one["period"]: one["measured"] for one in results_of(quick, "bilinear_game")["grid"]}
    expected = {1: 1.0012492197, 5: 0.9813269142 ** (1 / 5), 60: 1.1607691949 ** (1 / 60)}
    assert rates == pytest.approx(expected, abs=1e-10)


def test_noise_and_rate_of_the_outer_step_are_the_closed_forms(quick):
    module = importlib.import_module("outer_step")
    assert module.variance(0.7, 30, True, 0.6) == pytest.approx(1.310041384665, rel=1e-11)
    assert module.variance(1.0, 48, False, 0.5) == pytest.approx(1.504756880813, rel=1e-11)
    assert module.rate(0.7, 5, True, 0.9) == pytest.approx(0.8012544540, abs=1e-10)
    assert module.rate(0.7, 5, False, 0.9) == pytest.approx(0.9**0.5)
    for one in results_of(quick, "outer_step"):
        assert one["variance"] == pytest.approx(one["variance_expected"], rel=0.02)
        assert one["rate"] == pytest.approx(one["rate_expected"], abs=1e-12)


def test_the_bytes_on_the_wire_are_the_closed_form_divided_by_the_period(quick):
    module = importlib.import_module("communication")
    assert module.bytes_sent(4, 100) == 150
    assert module.seconds(8, 8, 7.0, 1.0, "ring") == 14 + 2
    assert module.seconds(8, 8, 7.0, 1.0, "tree") == 6 + 2
    results = results_of(quick, "communication")
    assert {one["period"] for one in results} == {None, 1, 10, 100}
    for one in results:
        expected = module.bytes_sent(one["workers"], one["size"]) / (one["period"] or 1)
        # Each message has a header, and each round a barrier.
        assert expected < one["bytes"] < 1.1 * expected


def test_moments_are_pulled_back_as_the_weights_are():
    at_sync = importlib.import_module("inner_moments").at_sync
    weight = torch.nn.Parameter(torch.zeros(1))
    inner, before_sync = torch.optim.SGD([weight], 0.1, momentum=1.0), []
    inner.register_step_post_hook(lambda *_: before_sync.append(float(inner.state[weight]["momentum_buffer"])))
    optimizer = Lookahead(inner, sync_period=1, slow_step_size=0.5)
    optimizer.register_step_post_hook(at_sync("pulled", ["momentum_buffer"]))
    for _ in range(4):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert before_sync == [1, 1.5, 2, 2.5]
    optimizer.register_step_post_hook(at_sync("zero", ["momentum_buffer"]))
    optimizer.step()
    assert float(optimizer.state[weight]["momentum_buffer"]) == 0


def test_each_form_of_inner_moments_is_tuned_within_its_learning_rates():
    module = importlib.import_module("inner_moments")
    results = json.loads((FOLDER / "results" / "inner_moments.json").read_text())["results"]
    assert len(results) == 2 * sum(map(len, module.FORMS.values()))
    for one in results:
        assert module.best(one)[1] not in (one["rates"][0], one["rates"][-1]), one["form"]


def test_accuracies_of_digits_are_of_every_setting_and_seed(quick):
    results = results_of(quick, "digits")
    for found in results["inner"].values():
        for kind, weights in (("bare", "bare"), ("wrapped", "fast"), ("wrapped", "slow")):
            accuracies = np.array(found[kind][f"{weights}, test"])
            assert accuracies.shape == (2, 2, 2)
            # Two epochs are enough to do better than chance.
            assert accuracies.max() > 50


def test_fast_and_slow_weights_of_digits_are_those_of_mid_cycle():
    results = json.loads((FOLDER / "results" / "digits.json").read_text())["results"]
    wrapped = results["inner"]["30% label noise, constant"]["wrapped"]
    assert wrapped["fast, test"] != wrapped["slow, test"]


def test_settings_are_chosen_in_validation_and_reported_in_test():
    module = importlib.import_module("digits")
    found = {"slow, validation": [[1.0, 1.0], [3.0, 3.0]], "slow, test": [[9.0, 9.0], [5.0, 7.0]]}
    index, test = module.chosen(found, "slow")
    assert index == (1,)
    assert test.tolist() == [5.0, 7.0]


def test_the_character_model_learns(quick):
    results = results_of(quick, "characters")
    for name in ("bare", "fast", "slow"):
        (curve,) = results["constant"][name][0]
        assert curve[-1] < curve[0] < np.log(96) + 1


def trained_by_pytorch(name, setting, params, batches, smoothing):
    """Train as one of the contenders of `label_noise` with PyTorch's own means; return the weights to evaluate."""
    layers = [torch.nn.Linear(*layer["w"].shape) for layer in params]
    for layer, values in zip(layers, params):
        layer.weight.data = torch.tensor(np.array(values["w"]).T)
        layer.bias.data = torch.tensor(np.array(values["b"]))
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    if name == "schedule-free":
        optimizer = schedulefree.SGDScheduleFree(model.parameters(), setting["rate"], momentum=setting["b1"])
        optimizer.train()
    else:
        optimizer = torch.optim.SGD(model.parameters(), setting["rate"] / 10, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches)) if name == "cosine" else None
    rule = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(setting["decay"])} if name == "EMA" else {}
    average = swa_utils.AveragedModel(model, **rule)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        cross_entropy = torch.nn.functional.cross_entropy
        cross_entropy(model(torch.tensor(x)), torch.tensor(y), label_smoothing=smoothing).backward()
        optimizer.step()
        if cosine:
            cosine.step()
        if name != "SWA" or step >= setting["start"] * len(batches):
            average.update_parameters(model)
    if name == "schedule-free":
        optimizer.eval()
    trained = (average.module if name in ("EMA", "SWA") else model).parameters()
    return [one.detach().numpy() for one in trained]


@pytest.mark.parametrize("name", ["cosine", "label smoothing", "EMA", "SWA", "schedule-free"])
def test_contenders_of_label_noise_train_as_those_of_pytorch(name):
    module = importlib.import_module("label_noise")
    (x, y), *_ = module.load()
    batches = [(x[first : first + 64], y[first : first + 64]) for first in range(0, 1024, 64)]
    setting = {**module.DEFAULTS, "decay": 0.8}
    smoothing = 0.1 if name == "label smoothing" else 0.0
    params = start = module.initial(jax.random.key(0))
    rule, evaluated = module.optimizer(name, setting, len(batches))
    state = rule.init(params)
    for x_batch, y_batch in batches:
        gradients = jax.grad(module.loss)(params, x_batch, y_batch, smoothing)
        updates, state = rule.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    weights = [one for layer in evaluated(state, params) for one in (layer["w"].T, layer["b"])]
    for weight, expected in zip(weights, trained_by_pytorch(name, setting, start, batches, smoothing)):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=2e-5)


def test_the_best_of_some_tries_is_expected_as_counted():
    module = importlib.import_module("label_noise")
    validation, test = [3.0, 1.0, 2.0], [60.0, 10.0, 50.0]
    for tries in (1, 2, 3):
        drawn = itertools.product(range(3), repeat=tries)
        best = [test[max(indices, key=validation.__getitem__)] for indices in drawn]
        assert module.expected(validation, test, tries) == pytest.approx(np.mean(best))


def test_a_share_of_labels_is_replaced():
    module = importlib.import_module("label_noise")
    for share in module.NOISES:
        # All labels are 10, which no random label is.
        found = module.replace(np.full(1000, 10), jax.random.key(0), share)
        assert np.sum(np.asarray(found) != 10) == 1000 * share


def test_each_contender_of_label_noise_is_tuned_within_its_learning_rates():
    results = json.loads((FOLDER / "results" / "label_noise.json").read_text())["results"]
    for one in results["contenders"]:
        for noise, at in zip(results["noises"], one["clean"]):
            assert results["rates"][0] < at["rate"] < results["rates"][-1], (one["name"], noise)


@pytest.mark.parametrize("name", NAMES)
def test_committed_tables_are_made_of_the_committed_results(tmp_path, name):
    content = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert "--quick" not in content["command"]
    module = importlib.import_module(name)
    # Whoever imports an experiment has other programs in the same process.
    assert not jax.config.jax_enable_x64
    common.draw(module, content, tmp_path)
    drawn = ROOT / "docs" / "experiments" / "drawn"
    for path in tmp_path.glob("*.md"):
        assert (drawn / path.name).read_text() == path.read_text(), path.name
    assert {one.name for one in drawn.glob(f"{name}_*")} == {one.name for one in tmp_path.iterdir()}


def test_the_table_of_other_implementations_is_made_of_what_they_answered():
    module = importlib.import_module("peers")
    content = json.loads((FOLDER / "results" / "peers.json").read_text())
    assert (ROOT / "docs" / "experiments" / "drawn" / "peers.md").read_text() == module.table(content)
    for name in ("torch", "optax", "tf_keras"):
        answers = content["answers"][f"lookahead_optim.{name}"]
        assert answers["path"] == [0.9, 0.8, 0.7, 0.6, 0.75, 0.65, 0.55, 0.45, 0.35, 0.5]
        assert (answers["loaded_later"], answers["resumed"]) == (4.75, 0)


def write_cifar(folder, classes, per_file=40):
    """Write files as CIFAR's authors do; the first pixel of an image says its class."""
    training, test, key, _ = cifar.FILES[folder.name]
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in training + test:
        labels = generator.integers(0, classes, per_file)
        images = generator.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        images[:, :1024] = labels[:, None] * (255 // classes)
        content = {b"batch_label": b"made", b"data": images, key: labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(("name", "classes", "files"), [("cifar-10-batches-py", 10, 5), ("cifar-100-python", 100, 1)])
def test_cifar_is_read_as_its_authors_distribute_it(tmp_path, name, classes, files):
    write_cifar(tmp_path / name, classes)
    (images, labels), (test_images, test_labels), found = cifar.load(tmp_path / name)
    assert found == classes
    assert images.shape == (40 * files, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert test_images.shape == (40, 3, 32, 32)
    # Channels come first, rows next: the first channel is the class.
    for part, of in ((images, labels), (test_images, test_labels)):
        assert torch.equal(part[:, 0, 3, 7].long(), of * (255 // classes))


def test_cifar_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="`folder` must be named"):
        cifar.load(tmp_path)
    write_cifar(tmp_path / "cifar-100-python", 100)
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(ValueError, match="is missing"):
        cifar.load(tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(Path("a")))
    with pytest.raises(pickle.UnpicklingError, match="holds arrays only"):
        cifar.load(tmp_path / "cifar-100-python")


def test_crops_and_flips_keep_rows_and_values():
    # The value says row and column, so that a crop or flip can be read off.
    image = (torch.arange(32)[:, None] * 100 + torch.arange(32) + 1.0).expand(1, 3, 32, 32)
    moved = set()
    for seed in range(200):
        found = cifar.augment(image, torch.Generator().manual_seed(seed))
        assert found.is_contiguous()
        (found,) = found
        inside = found[0] > 0
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        assert len(rows) >= 28
        assert len(columns) >= 28
        steps = found[0][rows[0], columns].diff()
        assert steps.abs().eq(1).all()
        assert found[0][rows, columns[0]].diff().eq(100).all()
        moved.add((int(found[0][16, 16] // 100), bool(steps[0] < 0)))
    assert len(moved) == 18


@pytest.mark.parametrize("lookahead", [{}, {"sync_period": 3, "slow_step_size": 0.8}])
def test_cifar_trains_a_resnet(tmp_path, lookahead):
    write_cifar(tmp_path / "cifar-10-batches-py", 10, per_file=96)
    data = cifar.load(tmp_path / "cifar-10-batches-py")
    curves = cifar.train(
        data, lookahead=lookahead, rate=0.05, weight_decay=1e-3, seed=1, epochs=6, device="cpu", width=8
    )
    assert curves.keys() == ({"fast", "slow"} if lookahead else {"bare"})
    for curve in curves.values():
        assert len(curve) == 6
        assert max(curve) > 30


def test_cifar_runs_as_a_command_and_draws_its_curves(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", 100)
    output = tmp_path / "found.json"
    few = ("--rates", "0.1", "--seeds", 1, "--epochs", 2, "--width", 4, "--validation", 10)
    run_script("cifar", tmp_path / "cifar-100-python", *few, "--output", output)
    content = json.loads(output.read_text())
    assert content["accuracy"] == "10 held-out images"
    assert [sorted(one["curves"]) for one in content["results"]] == [["bare"], ["fast", "slow"]]
    assert output.with_suffix(".svg").exists()


def test_options_of_the_outer_step_reach_the_optimizer_of_cifar(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cifar, "Lookahead", lambda *args, **kwargs: made.append(Lookahead(*args, **kwargs)) or made[-1])
    write_cifar(tmp_path / "cifar-10-batches-py", 10)
    app = typer.Typer()
    app.command()(cifar.main)
    options = "--sync-period 7 --slow-step-size 0.6 --slow-momentum 0.4 --no-slow-nesterov"
    few = f"--rates 0.1 --seeds 1 --epochs 1 --width 4 --device cpu --output {tmp_path / 'found.json'}"
    for given in (few, f"{few} {options}"):
        found = CliRunner().invoke(app, [str(tmp_path / "cifar-10-batches-py"), *given.split()])
        assert found.exit_code == 0, found.output
    names = "sync_period", "slow_step_size", "slow_momentum", "slow_nesterov"
    used = [tuple(one.param_groups[0][name] for name in names) for one in made]
    assert used == [(5, 0.8, 0.0, True), (7, 0.6, 0.4, False)]
    (bare, wrapped) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert (bare["lookahead"], tuple(wrapped["lookahead"].values())) == ({}, used[-1])


def test_resnet18_has_its_usual_number_of_parameters():
    assert sum(one.numel() for one in cifar.resnet18(10).parameters()) == 11_173_962
