"""`SlowWeightsMixin`: the Hugging Face Trainer scores and keeps the slow weights, and resumes with the fast weights."""

import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.child_processes import finish, start
from tests.comparison import assert_same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lookahead_optim.transformers import SlowWeightsMixin  # noqa: E402
from tests.test_torch import trainer_runs  # noqa: E402
from tests.test_torch.trainer_runs import (  # noqa: E402
    EVERY_TWO_STEPS,
    PERIOD,
    SIZE,
    Recorder,
    SlowWeightsTrainer,
    accuracy,
    bert,
    copied,
    trainer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def in_another_process(command, folder, *folders):
    """Return what a command of `trainer_runs` finds in each folder."""
    result = folder / f"{command}.pt"
    finish(start(trainer_runs, command, result, *folders), timeout=120)
    return torch.load(result, weights_only=True)


def weights(run):
    return [one.detach().clone() for one in run.model.parameters()]


def slow_weights(run):
    lookahead = run.optimizer.optimizer
    return [lookahead.state[one]["slow"] for one in run.model.parameters()]


def given(model):
    return Lookahead(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), PERIOD, SIZE)


EVERY_FOUR_STEPS = {**EVERY_TWO_STEPS, "save_steps": 4, "eval_steps": 4}
BEST = {"load_best_model_at_end": True, "num_train_epochs": 4}
RUNS = {
    "best, by epoch": {**BEST, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "best, accumulated": {**BEST, **EVERY_TWO_STEPS, "gradient_accumulation_steps": 2, "num_train_epochs": 6},
    "best, alone, by accuracy": {
        **BEST,
        **EVERY_FOUR_STEPS,
        "save_strategy": "best",
        "metric_for_best_model": "accuracy",
        "of_trainer": {"compute_metrics": accuracy},
    },
    "last": EVERY_TWO_STEPS,
    "last, models only": {**EVERY_TWO_STEPS, "save_only_model": True},
    "last, optimizer given": {**EVERY_TWO_STEPS, "optimizer": given},
}


class Kept(NamedTuple):
    """What a run has left.

    Attributes:
        run: The Trainer.
        recorded: The losses of its evaluations in training, by the name of the checkpoint of the same step.
        weights: The model after training.
        score: The loss of an evaluation after training.
        scores: The losses in another process of the models in its folders, "at the end" is by `save_model`.
    """

    run: SlowWeightsTrainer
    recorded: dict[str, float]
    weights: list[torch.Tensor]
    score: float
    scores: dict[str, float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    """Make all runs, and then let one process score everything that they have kept."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for name, arguments in RUNS.items():
        run = trainer(folder / name, **arguments)
        run.train()
        history = [entry for entry in run.state.log_history if "eval_loss" in entry]
        recorded = {f"checkpoint-{entry['step']}": entry["eval_loss"] for entry in history}
        runs[name] = Kept(run, recorded, weights(run), run.evaluate()["eval_loss"], {})
        run.save_model(str(folder / name / "at the end"))
    folders = [path.parent for path in folder.glob("*/*/model.safetensors")]
    scores = in_another_process("score", folder, *folders)
    for one in folders:
        runs[one.parent.name].scores[one.name] = scores[str(one)]
    return runs


@pytest.mark.parametrize("name", RUNS)
def test_each_checkpoint_is_the_model_that_was_scored(runs, name):
    kept = runs[name]
    checkpoints = {folder: score for folder, score in kept.scores.items() if folder != "at the end"}
    assert checkpoints
    assert checkpoints == {folder: kept.recorded[folder] for folder in checkpoints}


@pytest.mark.parametrize("name", RUNS)
def test_after_training_the_best_or_last_scored_model_is_there_and_is_saved(runs, name):
    kept = runs[name]
    state, is_best = kept.run.state, kept.run.args.load_best_model_at_end
    step = int(state.best_model_checkpoint.rpartition("-")[2]) if is_best else state.global_step
    # Otherwise fast and slow weights would be the same, or the best and the last weights.
    assert step % PERIOD
    assert not is_best or step < state.global_step
    assert kept.score == kept.scores["at the end"] == kept.recorded[f"checkpoint-{step}"]
    assert_same_bits(weights(kept.run), kept.weights)
    assert_same_bits(slow_weights(kept.run), kept.weights)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, one_thread):
    """The state of a run of 10 steps after each of them, and the folder of its checkpoints."""
    folder, recorder = tmp_path_factory.mktemp("unstopped"), Recorder()
    trainer(folder, of_trainer={"callbacks": [recorder]}, **EVERY_TWO_STEPS).train()
    return recorder.after, folder


def test_training_is_that_of_the_trainer_with_a_lookahead(tmp_path, unstopped):
    recorder = Recorder()
    bare = trainer(tmp_path, transformers.Trainer, of_trainer={"callbacks": [recorder]}, **EVERY_TWO_STEPS)
    bare.optimizer = Lookahead(bare.create_optimizer(), PERIOD, SIZE)
    bare.train()
    assert_same_bits(recorder.after, unstopped[0])


def test_resumed_in_a_new_process_is_the_run_that_never_stopped(tmp_path, unstopped):
    after, folder = unstopped
    steps = (4, 8)
    for step in steps:
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / str(step) / f"checkpoint-{step}")
    resumed = in_another_process("resume", tmp_path, *(tmp_path / str(step) for step in steps))
    for step in steps:
        assert_same_bits(resumed[str(tmp_path / str(step))], {late: after[late] for late in range(step + 1, 11)})


def test_resumed_by_a_trainer_that_has_trained_is_the_run_that_never_stopped(tmp_path, unstopped):
    after, folder = unstopped
    recorder = Recorder()
    run = trainer(tmp_path, of_trainer={"callbacks": [recorder]}, **EVERY_TWO_STEPS)
    run.train()
    recorder.after.clear()
    run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same_bits(recorder.after, {late: after[late] for late in range(5, 11)})


def test_a_checkpoint_without_an_optimizer_resumes_from_the_slow_weights(tmp_path, unstopped):
    _, folder = unstopped
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    slow = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    started = []

    class AtTheBeginning(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            started.extend(copied(dict(enumerate(parameters))).values())

    trainer(tmp_path, of_trainer={"callbacks": [AtTheBeginning()]}).train(resume_from_checkpoint=True)
    assert_same_bits(started, [slow[index]["slow"] for index in range(len(slow))])


def test_training_again_starts_from_the_weights_that_were_scored(tmp_path):
    recorder, started = Recorder(), []

    class AtTheBeginning(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            started.extend(one.detach().clone() for one in model.parameters())

    run = trainer(tmp_path, of_trainer={"callbacks": [recorder]}, num_train_epochs=1)
    run.train()
    kept, optimizer = weights(run), run.optimizer
    fast = recorder.after[5]["model"]
    assert not any(torch.equal(one, fast[name]) for name, one in run.model.named_parameters())
    run.add_callback(AtTheBeginning())
    run.train()
    assert_same_bits(started, kept)
    assert run.optimizer is optimizer
    assert optimizer.param_groups[0]["lookahead_step"] == 10


def test_evaluation_before_training_is_the_plain_trainers(tmp_path):
    run, plain = trainer(tmp_path), trainer(tmp_path, transformers.Trainer)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert_same_bits(run.predict(run.eval_dataset).predictions, plain.predict(plain.eval_dataset).predictions)
    run.save_model(str(tmp_path / "model"))
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert_same_bits(list(saved.parameters()), weights(plain))


def test_the_groups_with_and_without_weight_decay_are_kept(tmp_path):
    run, plain = trainer(tmp_path), trainer(tmp_path, transformers.Trainer)
    optimizer, bare = run.create_optimizer(), plain.create_optimizer()
    assert isinstance(optimizer, Lookahead)
    assert type(optimizer.inner_optimizer) is type(bare)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group, expected in zip(optimizer.param_groups, bare.param_groups, strict=True):
        assert_same_bits(group["params"], expected["params"])
        assert (group["sync_period"], group["slow_step_size"]) == (PERIOD, SIZE)
        assert {name: group[name] for name in expected if name != "params"} == {
            name: value for name, value in expected.items() if name != "params"
        }
    assert run.create_optimizer() is optimizer


def test_a_bare_optimizer_that_is_given_is_wrapped(tmp_path):
    run = trainer(tmp_path, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), num_train_epochs=1)
    inner = run.optimizer
    run.train()
    assert run.optimizer.optimizer.inner_optimizer is inner
    assert inner.param_groups[0]["lookahead_step"] == 5


def test_settings_are_those_of_lookahead_by_default(tmp_path):
    optimizer = trainer(tmp_path, of_trainer={"lookahead_kwargs": None}).create_optimizer()
    assert {(group["sync_period"], group["slow_step_size"]) for group in optimizer.param_groups} == {(6, 0.5)}


def test_each_model_of_a_model_init_has_a_lookahead_of_its_own(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, of_trainer={"model_init": bert, "callbacks": [recorder]}, **EVERY_TWO_STEPS)
    run.train()
    first, after = run.optimizer, copied(recorder.after)
    run.train()
    assert run.optimizer is not first
    assert_same_bits(recorder.after, after)
    assert_same_bits(slow_weights(run), weights(run))


class Observer(transformers.TrainerCallback):
    """Records at some events between syncs whether the model has the slow weights, and whether the fast weights."""

    def __init__(self):
        self.seen = {}

    def note(self, event, state, optimizer):
        if state.global_step % PERIOD:
            entries = optimizer.state_dict()["state"]
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            slow = all(torch.equal(one, entries[index]["slow"]) for index, one in enumerate(parameters))
            fast = not any("lookahead_fast" in of_parameter for of_parameter in entries.values())
            self.seen.setdefault(event, set()).add((slow, fast))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.note("step end", state, optimizer)

    def on_evaluate(self, args, state, control, optimizer=None, **kwargs):
        self.note("evaluate", state, optimizer)

    def on_save(self, args, state, control, optimizer=None, **kwargs):
        self.note("save", state, optimizer)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self.note("train end", state, optimizer)


def test_callbacks_find_slow_weights_after_an_evaluation_and_at_the_end(tmp_path):
    observer = Observer()
    trainer(tmp_path, of_trainer={"callbacks": [observer]}, **EVERY_TWO_STEPS).train()
    assert observer.seen == {
        "step end": {(False, True)},
        "evaluate": {(True, False)},
        "save": {(False, True)},
        "train end": {(True, True)},
    }


def test_what_is_predicted_and_saved_in_training_is_of_the_slow_weights(tmp_path):
    recorder, predictions = Recorder(), []

    class InTheMiddle(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                predictions.append(run.predict(run.eval_dataset).predictions)
                run.save_model(str(tmp_path / "model"))
                assert_same_bits(dict(run.model.state_dict()), recorder.after[4]["model"])

    run = trainer(tmp_path, of_trainer={"callbacks": [recorder, InTheMiddle()]})
    run.train()
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    plain = trainer(tmp_path, transformers.Trainer, saved)
    assert_same_bits(predictions, [plain.predict(plain.eval_dataset).predictions])
    # In the order of the optimizer's groups.
    groups = plain.create_optimizer().param_groups
    slow = recorder.after[4]["optimizer"]["state"]
    for index, parameter in enumerate(parameter for group in groups for parameter in group["params"]):
        assert_same_bits(parameter, slow[index]["slow"])


def test_an_exception_in_an_evaluation_leaves_the_fast_weights(tmp_path):
    def fail(prediction):
        raise ArithmeticError

    recorder = Recorder()
    callbacks = {"callbacks": [recorder], "compute_metrics": fail}
    run = trainer(tmp_path, of_trainer=callbacks, **EVERY_TWO_STEPS)
    for evaluate in (run.train, run.evaluate, lambda: run.predict(run.eval_dataset)):
        with pytest.raises(ArithmeticError):
            evaluate()
        assert_same_bits(dict(run.model.state_dict()), recorder.after[2]["model"])


class InOwnWay(SlowWeightsTrainer):
    """Scores by the sum of the weights, and by the loop without `super().evaluate`."""

    def evaluate(self, *args, **kwargs):
        with self.slow_weights():
            total = sum(one.double().sum().item() for one in self.model.parameters())
        output = self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
        metrics = {"eval_sum": total, "eval_loss": output.metrics["eval_loss"]}
        self.log(metrics)
        return metrics


def test_evaluations_of_ones_own_score_the_slow_weights(tmp_path):
    assert trainer(tmp_path, InOwnWay).evaluate()["eval_sum"] == sum(
        one.double().sum().item() for one in bert().parameters()
    )
    run = trainer(tmp_path, InOwnWay, save_strategy="epoch", eval_strategy="epoch")
    run.train()
    (last,) = [entry for entry in run.state.log_history if "eval_sum" in entry and entry["step"] == 10]
    now = run.evaluate()
    assert {name: last[name] for name in now} == now


def test_a_checkpoint_of_a_search_with_ray_has_both_weights(tmp_path, unstopped):
    class Saver(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                run._tune_save_checkpoint(str(tmp_path))

    run = trainer(tmp_path / "run", of_trainer={"callbacks": [Saver()]}, **EVERY_TWO_STEPS)
    run.train()
    _, folder = unstopped
    saved, expected = (
        [
            torch.load(path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"],
            dict(transformers.BertForSequenceClassification.from_pretrained(path / "checkpoint-4").state_dict()),
        ]
        for path in (tmp_path, folder)
    )
    assert_same_bits(saved, expected)


def test_the_mixin_after_the_trainer_is_refused():
    with pytest.raises(TypeError, match=r"must come before the `Trainer`.*class Wrong\(Trainer, SlowWeightsMixin\)"):

        class Wrong(transformers.Trainer, SlowWeightsMixin):
            pass


def test_settings_beside_a_lookahead_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`lookahead_kwargs` must not be given with a `Lookahead`"):
        trainer(tmp_path, optimizer=given, of_trainer={"lookahead_kwargs": {"sync_period": 4}})


class WithModes(torch.optim.SGD):
    """An optimizer that puts other weights into the model for evaluations."""

    def eval(self):
        pass


def test_an_optimizer_with_weights_of_its_own_for_evaluations_is_refused(tmp_path):
    run = trainer(tmp_path, optimizer=lambda model: WithModes(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Received: WithModes, which has an `eval` method"):
        run.train()


def test_deepspeed_is_refused(tmp_path):
    class WithDeepSpeed(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    class Trainer(SlowWeightsMixin, WithDeepSpeed):
        pass

    with pytest.raises(ValueError, match="does not work with DeepSpeed"):
        trainer(tmp_path, Trainer)


@pytest.mark.parametrize(
    "name",
    ["create_optimizer", "evaluate", "evaluation_loop", "save_model", "_save_checkpoint", "_tune_save_checkpoint"],
)
def test_what_the_mixin_overrides_is_there(name):
    assert callable(getattr(transformers.Trainer, name, None)), (
        f"transformers {transformers.__version__} has no `Trainer.{name}` any more, which `SlowWeightsMixin` overrides."
    )


def test_the_module_imports_what_the_trainer_does_and_nothing_more():
    others = {"jax", "keras", "lightning", "optax", "tensorflow", "tf_keras", "torch", "transformers"}
    report = f"print(sorted({others} & {{name.partition('.')[0] for name in sys.modules}}))"
    code = f"import sys; from transformers import Trainer; {report}; import lookahead_optim.transformers; {report}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    alone, with_mixin = done.stdout.splitlines()
    assert with_mixin == alone
