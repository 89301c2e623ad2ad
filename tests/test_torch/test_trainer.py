"""In the Hugging Face Trainer: training, its checkpoints, accumulation, clipping, evaluation on the slow weights."""

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand
from tests.test_torch.small_task import PERIOD, SIZE, momentum, network, step_lr

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BATCH, BATCHES = 8, 5
pytestmark = pytest.mark.usefixtures("one_thread")


class Regression(torch.nn.Module):
    """Has what the Trainer needs from a model: a loss, computed from the columns of the data."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, inputs, labels):
        prediction = self.network(inputs)
        return {"loss": torch.nn.functional.mse_loss(prediction, labels), "prediction": prediction}


def regression():
    torch.manual_seed(0)
    return Regression()


def regression_data():
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(BATCH * BATCHES, 6, generator=generator)
    return [{"inputs": row[:4], "labels": row[4:]} for row in data]


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def bert_data():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (BATCH * BATCHES, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


TASKS = {regression: regression_data, bert: bert_data}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def trainer(folder, task=regression, inner=adamw, scheduler=step_lr, kind=transformers.Trainer, **arguments):
    model = task()
    optimizer = Lookahead(inner(model), PERIOD, SIZE)
    data = TASKS[task]()
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "dataloader_pin_memory": False,
    }
    return kind(
        model,
        transformers.TrainingArguments(**{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data[:BATCH],
        optimizers=(optimizer, scheduler and scheduler(optimizer)),
    )


def by_hand(task=regression, inner=adamw, scheduler=step_lr, steps=2 * BATCHES, accumulate=1, clip=1.0):
    """The same training by hand. Return the model and the `ByHand`."""
    model, data = task(), TASKS[task]()
    hand = ByHand(inner(model), PERIOD, SIZE)
    scheduler = scheduler(hand.optimizer)
    batches = list(torch.utils.data.DataLoader(data, BATCH))
    while True:
        for start in range(0, BATCHES, accumulate):
            if hand.steps == steps:
                return model, hand
            micro_batches = batches[start : start + accumulate]
            for batch in micro_batches:
                (model(**batch)["loss"] / len(micro_batches)).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            hand.step()
            scheduler.step()
            hand.optimizer.zero_grad()


def slow_weights(optimizer):
    return [optimizer.state[one]["slow"] for group in optimizer.param_groups for one in group["params"]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("inner", [adamw, momentum])
def test_training_is_the_plain_loop(tmp_path, task, inner):
    run = trainer(tmp_path, task, inner)
    run.train()
    model, hand = by_hand(task, inner)
    assert run.optimizer.param_groups[0]["lookahead_step"] == run.state.global_step == hand.steps
    assert_same_bits(run.model.parameters(), model.parameters())
    assert_same_bits(slow_weights(run.optimizer), hand.slow)


def test_scheduler_of_the_trainer_moves_the_learning_rate_of_the_inner_optimizer(tmp_path):
    run = trainer(tmp_path, scheduler=None, warmup_steps=3)
    run.train()

    def linear(optimizer):
        return transformers.get_linear_schedule_with_warmup(optimizer, 3, 2 * BATCHES)

    model, hand = by_hand(scheduler=linear)
    assert_same_bits(run.model.parameters(), model.parameters())
    assert_same_bits(slow_weights(run.optimizer), hand.slow)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_with_accumulation_and_clipping_is_the_plain_loop(tmp_path, accumulate, clip):
    run = trainer(tmp_path, inner=momentum, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    run.train()
    steps = 2 * -(-BATCHES // accumulate)
    model, hand = by_hand(inner=momentum, accumulate=accumulate, clip=clip, steps=steps)
    assert run.optimizer.param_groups[0]["lookahead_step"] == run.state.global_step == steps
    assert_same_bits(run.model.parameters(), model.parameters())
    assert_same_bits(slow_weights(run.optimizer), hand.slow)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("inner", [adamw, momentum])
def test_resumed_in_mid_cycle_is_the_run_that_never_stopped(tmp_path, task, inner):
    # Step 4 is one step after a sync, in the first epoch. Step 8 is one step before a sync, in the second epoch.
    whole = trainer(tmp_path, task, inner, save_strategy="steps", save_steps=4)
    whole.train()
    for step in (4, 8):
        resumed = trainer(tmp_path, task, inner)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 2 * BATCHES
        assert_same_bits(resumed.model.parameters(), whole.model.parameters())
        assert_same_bits(slow_weights(resumed.optimizer), by_hand(task, inner)[1].slow)


class SlowWeightsTrainer(transformers.Trainer):
    """Evaluates and predicts on the slow weights, as a user writes it."""

    def evaluation_loop(self, *args, **kwargs):
        # While the Trainer trains, Accelerate's wrapper is around the optimizer.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        with optimizer.slow_weights():
            return super().evaluation_loop(*args, **kwargs)


def evaluation_of(model, weights):
    with torch.no_grad():
        for one, value in zip(model.parameters(), weights):
            one.copy_(value)
        return model(**next(iter(torch.utils.data.DataLoader(regression_data(), BATCH))))


def test_evaluation_is_on_the_slow_weights_and_changes_nothing(tmp_path):
    run = trainer(tmp_path, kind=SlowWeightsTrainer, eval_strategy="steps", eval_steps=1)
    run.train()
    model, hand = by_hand()
    assert_same_bits(run.model.parameters(), model.parameters())
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    expected = [evaluation_of(regression(), by_hand(steps=steps)[1].slow)["loss"].item() for steps in range(1, 11)]
    assert losses == expected
    predicted = torch.from_numpy(run.predict(run.eval_dataset).predictions)
    assert_same_bits([predicted], [evaluation_of(regression(), hand.slow)["prediction"]])
    assert_same_bits(run.model.parameters(), model.parameters())


def test_evaluation_before_training_is_on_the_initial_weights(tmp_path):
    run = trainer(tmp_path, kind=SlowWeightsTrainer)
    initial = list(regression().parameters())
    assert run.evaluate()["eval_loss"] == evaluation_of(regression(), initial)["loss"].item()
    assert_same_bits(run.model.parameters(), initial)


class SyncAtTheEnd(transformers.TrainerCallback):
    """Leaves the slow weights in the model at the end of training, as a user writes it."""

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.optimizer.sync()


def test_callback_can_synchronise_at_the_end(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(SyncAtTheEnd())
    run.train()
    model, hand = by_hand()
    expected = [torch.lerp(slow, fast.detach(), SIZE) for slow, fast in zip(hand.slow, model.parameters())]
    assert_same_bits(run.model.parameters(), expected)


def test_saved_model_in_a_slow_weights_block_has_the_slow_weights(tmp_path):
    run = trainer(tmp_path)
    run.train()
    with run.optimizer.optimizer.slow_weights():
        run.save_model(str(tmp_path / "slow"))
    (file,) = (tmp_path / "slow").glob("*model*")
    load = pytest.importorskip("safetensors.torch").load_file if file.suffix == ".safetensors" else torch.load
    saved = load(file)
    assert_same_bits([saved[name] for name, _ in run.model.named_parameters()], by_hand()[1].slow)
