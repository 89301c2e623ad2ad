"""Every experiment runs and agrees with its closed form. Its committed tables are made from its committed results."""

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
    "slow_momentum_risk",
    "inner_moments",
    "communication",
    "workers",
    "digits",
    "adversarial",
    "label_noise",
    "characters",
    "batch_sizes",
    "bfloat16",
    "loss_surface",
    "sensitivity",
]


def run_script(name, *arguments):
    """Run an experiment as its users do, and return its output."""
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


def test_stationary_variances_of_cycles_are_the_closed_forms():
    module, noisy = (importlib.import_module(name) for name in ("slow_momentum_risk", "noisy_quadratic"))

    def variance(*way):
        # The first direction has curvature 1 and noise of variance 1.
        return module.stationary(*module.cycle(way, 0.1))[0, 0, 0] / noisy.variance_sgd(0.1)

    assert variance(0.0, 30, 0.7, 0.6, True) == pytest.approx(1.310041384665, rel=1e-11)
    assert variance(0.0, 48, 1.0, 0.5, False) == pytest.approx(1.504756880813, rel=1e-11)
    # With heavy ball inside, an autoregression of second order: g a (1 + b) / ((1 - b) (2 (1 + b) - g a)).
    of_heavy_ball = 0.1 * 1.9 / (0.1 * (3.8 - 0.1))
    assert variance(0.9, 1, 1.0, 0.0, True) * noisy.variance_sgd(0.1) == pytest.approx(of_heavy_ball, rel=1e-11)
    found = module.expected_losses((0.0, 5, 0.5, 0.0, True), 0.3, range(0, 201, 4))
    np.testing.assert_allclose(found, noisy.expected_losses(0.3, 5, 0.5, 200)[::4], rtol=1e-11)


def test_losses_of_slow_momentum_follow_the_recursion(quick, monkeypatch):
    module = importlib.import_module("slow_momentum_risk")
    for one in results_of(quick, "slow_momentum_risk")["curves"]:
        np.testing.assert_allclose(one["measured"], one["expected"], rtol=0.01)
    # From the minimum there is only the noise.
    monkeypatch.setattr(module, "START", 0.0)
    for way in (module.WAYS["0.7/0.9/30 (DiLoCo)"], module.WAYS["heavy ball, 0.9"], (0.0, 6, 0.7, 0.6, False)):
        cycles = 60 // way[1]
        start = np.zeros((2, 400, 100), "float32")
        measured = module.measure_losses(jax.random.key(0), 0.05, start, way, cycles, 2)
        expected = module.expected_losses(way, 0.05, range(1, cycles + 1), workers=2)
        np.testing.assert_allclose(measured, expected, rtol=0.1)


def test_losses_of_matched_rates_settle_when_a_search_through_all_cycles_says_so():
    module = importlib.import_module("slow_momentum_risk")
    wanted = module.risk(module.SGD, 0.5)
    for way in module.WAYS.values():
        rate = module.matched_rate(way, wanted)
        assert module.risk(way, rate) == pytest.approx(wanted)
        losses = module.expected_losses(way, rate, range(2000 // way[1]), workers=4)
        above = np.flatnonzero(losses > 1.1 * wanted / 4)
        assert module.settled(way, rate, wanted, 20_000, workers=4) == (above[-1] + 1) * way[1]
        assert module.settled(way, rate, wanted, 20_000, workers=4) > way[1]


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


def test_workers_search_until_the_best_rate_has_a_worse_one_on_both_sides():
    search = importlib.import_module("workers").search
    tried = []

    def loss_at(rate):
        tried.append(rate)
        return abs(np.log2(rate))

    assert search(loss_at, 4.0) == {0.5: 1.0, 1.0: 0.0, 2.0: 1.0, 4.0: 2.0, 8.0: 3.0}
    assert tried == [4.0, 8.0, 2.0, 1.0, 0.5]
    results = json.loads((FOLDER / "results" / "workers.json").read_text())["results"]
    for one in results["ways"]:
        rates = sorted(map(float, one["tuning"]))
        assert rates[0] < one["rate"] < rates[-1]
        assert one["tuning"][str(one["rate"])] == min(one["tuning"].values())


def test_workers_in_processes_make_the_steps_of_simulated_ones(quick):
    results = results_of(quick, "workers")
    processes = results["processes"]
    assert processes["difference"] < 1e-10
    # Headers of messages count too.
    assert processes["bytes_expected"] < processes["bytes_of_a_sync"] < 1.05 * processes["bytes_expected"]
    for one in results["ways"]:
        (curve,) = one["curves"]
        assert curve[-1] < curve[0]


def test_the_frechet_distance_is_the_closed_form():
    frechet = importlib.import_module("adversarial").frechet
    samples = np.random.default_rng(0).normal(size=(1000, 2))
    samples = (samples - samples.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    assert frechet(samples, samples) == pytest.approx(0, abs=1e-12)
    assert frechet(samples * [2, 0.5] + [3, -1], samples) == pytest.approx(9 + 1 + 1 + 0.25)
    stretched, turned = samples * [2, 0.5], samples @ np.linalg.cholesky([[2, 1], [1, 2]]).T
    # Covariances A = diag(4, 1/4) and B = [[2, 1], [1, 2]] do not commute. For two by two matrices the trace of the
    # root of AB is (tr AB + 2 sqrt(det AB))^(1/2).
    root = (4 * 2 + 0.25 * 2 + 2 * np.sqrt(1 * 3)) ** 0.5
    assert frechet(stretched, turned) == pytest.approx(4.25 + 4 - 2 * root)


def test_both_players_synchronise_after_an_iteration_as_in_algorithm_1():
    module = importlib.import_module("adversarial")
    images, rate, seed, key = module.real()["images"], 1e-3, 3, jax.random.key(0)
    begin, train = module.compiled("bare")
    carried = begin(rate, seed)
    slow = carried[0]
    for index in range(13):
        carried = train(rate, carried, images, key, index, index + 1)
        if index % 5 == 4:
            slow = jax.tree.map(lambda slow, fast: slow + 0.5 * (fast - slow), slow, carried[0])
            carried = slow, *carried[1:]
    begin, train = module.compiled("k = 5")
    players, _, state, _ = train(rate, begin(rate, seed), images, key, 0, 13)
    found = players, module.slow_params(state, players)
    for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves((carried[0], slow))):
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_adversarial_training_is_tuned_apart_and_compared_at_its_end():
    module = importlib.import_module("adversarial")
    early, late = [9.0] * 15 + [1.0] * 5, [1.0] * 15 + [3.0] * 5
    # The first rate is better with the seeds for tuning, the second with the others.
    tuning = [
        {"way": "bare", "rate": 0.1, "curves": {"bare": [early]}},
        {"way": "bare", "rate": 0.2, "curves": {"bare": [late]}},
    ]
    runs = [
        {"way": "bare", "rate": 0.2, "curves": {"bare": [early, early]}},
        {"way": "bare", "rate": 0.1, "curves": {"bare": [late, late]}},
    ]
    results = {"tuning": tuning, "runs": runs, "of_gaussian": 2.5}
    assert module.best_rates(tuning) == [("bare", 0.1)]
    assert module.chosen(results, "bare", "bare") == (0.1, [late, late])
    assert module.at_end([early, [*early[:19], None]]).tolist() == [1, np.inf]
    assert module.failed(results, "bare", "bare") == (1, 2)


def test_the_character_model_learns(quick):
    results = results_of(quick, "characters")
    for name in ("bare", "fast", "slow"):
        (curve,) = results["constant"][name][0]
        assert curve[-1] < curve[0] < np.log(96) + 1


def test_a_seed_of_the_character_model_has_the_rate_that_the_other_seeds_choose():
    at_the_best_rate = importlib.import_module("characters").at_the_best_rate
    # Seed 1 alone would choose the second rate for all.
    losses = np.array([[1.0, 9.0, 1.0], [2.0, 2.0, 2.0]])
    assert at_the_best_rate(losses).tolist() == [2.0, 9.0, 2.0]


def trained_by_pytorch(name, setting, params, batches, smoothing):
    """Train a contender of `label_noise` with PyTorch's own tools; return the weights to evaluate."""
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
        # All labels are 10. No random label is 10.
        found = module.replace(np.full(1000, 10), jax.random.key(0), share)
        assert np.sum(np.asarray(found) != 10) == 1000 * share


def test_each_contender_of_label_noise_is_tuned_within_its_learning_rates():
    results = json.loads((FOLDER / "results" / "label_noise.json").read_text())["results"]
    for one in results["contenders"]:
        for noise, at in zip(results["noises"], one["clean"]):
            assert results["rates"][0] < at["rate"] < results["rates"][-1], (one["name"], noise)


def test_the_share_of_a_ladder_is_the_area_below_its_lines():
    share = importlib.import_module("sensitivity").share
    rates = [0.01, 0.1, 1.0]
    assert share(rates, np.array([[0.0, 10.0, 0.0]]), 5.0) == pytest.approx(0.5)
    assert share(rates, np.array([[-np.inf, 10.0, 0.0]]), 5.0) == pytest.approx(0.25)
    assert share(rates, np.array([[7.0, 7.0, 7.0], [7.0, 0.0, -np.inf]]), 7.0) == pytest.approx(0.5)
    generator = np.random.default_rng(0)
    rates, scores = np.sort(generator.uniform(0.001, 1, 7)), generator.normal(size=(3, 7))
    dense = np.linspace(np.log(rates[0]), np.log(rates[-1]), 100_001)
    expected = np.mean([np.interp(dense, np.log(rates), line) >= 0.3 for line in scores])
    assert share(rates, scores, 0.3) == pytest.approx(expected, abs=1e-3)


def test_sensitivities_differ_where_the_sides_do():
    module = importlib.import_module("sensitivity")
    bare = np.array([[[0.0, 2.0], [10.0, 10.0], [0.0, 2.0]]])
    same = module.measured(module.task("a", "b", [0.01, 0.1, 1.0], 5, "points", bare, bare))
    assert same["own, difference"] == same["both, difference"] == [0, 0, 0]
    # The wrapped side is flatter and lower. So more of its points are close to its own best, and fewer are close to the
    # best of both.
    one = module.measured(module.task("a", "b", [0.01, 0.1, 1.0], 5, "points", bare, bare / 2 + 1))
    assert one["own, difference"][0] > 0 > one["both, difference"][0]
    assert (one["cut, bare"], one["cut, wrapped"]) == ([False, False], [True, True])
    mean, low, high = one["own, bare"]
    assert (low, mean, high) == pytest.approx((0.5, 5 / 9, 0.625), abs=1e-4)


def test_committed_sensitivities_are_of_the_committed_results(quick):
    committed = json.loads((FOLDER / "results" / "sensitivity.json").read_text())["results"]
    found = results_of(quick, "sensitivity")
    assert [(one["group"], one["name"]) for one in found] == [(one["group"], one["name"]) for one in committed]
    for one, other in zip(found, committed):
        for key in ("own, bare", "own, wrapped", "both, bare", "both, wrapped"):
            assert one[key][0] == pytest.approx(other[key][0], abs=1e-3)


def test_every_batch_size_sees_the_same_text_in_the_same_order():
    module = importlib.import_module("batch_sizes")
    text = np.arange(1000)
    starts = {batch: module.batches(text, 128, batch, seed=3) for batch in module.LADDERS}
    assert [one.shape for one in starts.values()] == [(64, 2), (16, 8), (4, 32)]
    for one in starts.values():
        np.testing.assert_array_equal(one.ravel(), starts[2].ravel())
    assert (module.batches(text, 128, 2, seed=4) != starts[2]).any()


def test_losses_of_batch_sizes_are_compared_seed_by_seed():
    module = importlib.import_module("batch_sizes")
    found = {"AdamW": {2: {"losses": [2.0, 1.0]}}, "other": {2: {"losses": [1.75, 1.5]}}}
    np.testing.assert_array_equal(module.against_adamw(found, "other", 2), [-0.25, 0.5])


@pytest.mark.parametrize("name", ["batch_sizes", "bfloat16"])
def test_each_training_of_character_models_is_tuned_within_its_learning_rates(name):
    results = json.loads((FOLDER / "results" / f"{name}.json").read_text())["results"]
    for one in results["runs"]:
        rates = results["ladders"][str(one["batch"])] if name == "batch_sizes" else results["rates"]
        assert one["rate"] == rates[int(np.argmin(one["tuning"]))]
        assert one["rate"] not in (rates[0], rates[-1]), one


def test_numbers_in_bfloat16_are_those_that_the_experiment_names():
    module = importlib.import_module("bfloat16")
    params = jax.eval_shape(module.initial_params, 0)
    integers = jax.ShapeDtypeStruct((1000,), "int8"), jax.ShapeDtypeStruct((12, 2), int)

    def dtypes(tree):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}

    for name, which in module.ways():
        weights, _, slow = module.DTYPES[which]
        trained, state, evaluated = jax.eval_shape(module.compiled(name, which, 12), 1e-3, params, *integers)
        inner = state if name == "AdamW" else state.inner_state
        assert dtypes([trained, evaluated, inner[0].mu, inner[0].nu]) == {weights}
        if name != "AdamW":
            assert dtypes(state.slow_params) == {slow}
        if name == "slow momentum 0.6":
            assert dtypes(state.outer_state.slow_momentum) == {slow}


@pytest.mark.parametrize("name", NAMES)
def test_committed_tables_are_made_of_the_committed_results(tmp_path, name):
    content = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert "--quick" not in content["command"]
    module = importlib.import_module(name)
    # A program that imports an experiment has other code in the same process.
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


def test_the_readme_says_of_other_implementations_what_they_answered():
    answers = json.loads((FOLDER / "results" / "peers.json").read_text())["answers"]
    names = {name.replace("lookahead_optim.torch", "lookahead-optim"): found for name, found in answers.items()}
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line.count(" | ") == 4)
    say = {True: "yes", False: "no", None: "-"}
    shown = [name for name in names if name in rows]
    assert len(shown) == 7
    for name in shown:
        one = names[name]
        exact, kept = one["path"][4] == 0.75, one["loaded_later"] in (4.75, 4.5)
        part = None if name == "optax.lookahead" else one["without_gradient"] in (0.6, 0.4)
        cells = [say[exact], say[kept], say[one["resumed"] == 0], say[part]]
        assert rows[name] == " | ".join(cells), name


def test_the_caption_of_the_first_picture_has_the_distances_of_its_results():
    results = json.loads((FOLDER / "results" / "loss_surface.json").read_text())["results"]
    slow, bare = (np.linalg.norm(results[name][-1]) for name in ("slow", "bare"))
    words = f"After 30 steps the slow weights are at a distance of {slow:.2f} from the optimum. SGD without "
    words += f"Lookahead is at {bare:.2f}."
    assert len(results["bare"]) == 31
    for page in ("README.md", "docs/index.md"):
        assert words in " ".join((ROOT / page).read_text().split()), page


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
    # The value encodes row and column, so that a crop or flip can be seen.
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
