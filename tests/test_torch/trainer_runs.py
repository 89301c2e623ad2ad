"""The runs of test_transformers_slow_weights.py, and the process that reads what they kept.

python -m tests.test_torch.trainer_runs score RESULT FOLDER...     scores the models in folders by a plain Trainer
python -m tests.test_torch.trainer_runs resume RESULT FOLDER...    resumes runs from the last checkpoints in folders
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers

from lookahead_optim.transformers import SlowWeightsMixin

PERIOD, SIZE = 3, 0.25
BATCH, BATCHES = 8, 5
EVERY_TWO_STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


class SlowWeightsTrainer(SlowWeightsMixin, transformers.Trainer):
    pass


class Recorder(transformers.TrainerCallback):
    """Keeps the state of model and optimizer after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after[state.global_step] = copied({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def copied(tree):
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [copied(value) for value in tree]
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def rows(number, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (number, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(folder, kind=SlowWeightsTrainer, model=None, optimizer=None, of_trainer=None, **arguments):
    """Make a Trainer of BERT, with dropout and a schedule.

    Args:
        folder: Where it saves.
        kind: Its class.
        model: The model, if it is not to be a new one.
        optimizer: Function that makes the optimizer for the model, if it is not to be the Trainer's own.
        of_trainer: Other arguments of its class.
        **arguments: Those of `TrainingArguments`.
    """
    of_trainer = of_trainer or {}
    if kind is not transformers.Trainer and optimizer is None:
        of_trainer = {"lookahead_kwargs": {"sync_period": PERIOD, "slow_step_size": SIZE}, **of_trainer}
    if "model_init" not in of_trainer:
        model = model or bert()
    if optimizer is not None:
        of_trainer = {"optimizers": (optimizer(model), None), **of_trainer}
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 0.5,
        "weight_decay": 0.1,
        "dataloader_pin_memory": False,
    }
    made = kind(
        model,
        transformers.TrainingArguments(**{**settings, **arguments}),
        train_dataset=rows(BATCH * BATCHES, seed=1),
        eval_dataset=rows(2 * BATCH, seed=2),
        **of_trainer,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def score(folder):
    """Return the loss of the model in a folder, read by a program that does not know Lookahead."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    return trainer(folder, transformers.Trainer, model).evaluate()["eval_loss"]


def resume(folder):
    """Train to the end, and return the state after each step."""
    recorder = Recorder()
    # The evaluations draw random numbers, as in the run that was saved.
    trainer(folder, of_trainer={"callbacks": [recorder]}, **EVERY_TWO_STEPS).train(resume_from_checkpoint=True)
    return recorder.after


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    command, result, *folders = sys.argv[1:]
    function = {"score": score, "resume": resume}[command]
    torch.save({folder: function(Path(folder)) for folder in folders}, result)
