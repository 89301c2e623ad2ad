"""Weights in bfloat16: what slow weights lose in it on a character model, and what AdamW alone loses.

AdamW alone, in Lookahead, and with slow momentum. All numbers are in float32 or all are in bfloat16 (weights, moments,
arithmetic), or all but the slow weights. The learning rate decays to 0, and each way has the best of as many rates. The
loss is computed in float32 with the weights as they are. With the Optax front end.
"""

import functools
import itertools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from common import BARE, FAST, SLOW, command, in_processes, in_words, markdown, paired
from lookahead_optim.optax import lookahead, slow_params
from source_text import described, load
from transformer import CONTEXT, initial_params, loss_of, starts_of_pieces

BATCH = 8
# Sync period, slow step size and slow momentum.
OUTER = {"AdamW": None, "Lookahead(6, 0.5)": (6, 0.5, 0.0), "slow momentum 0.6": (30, 0.7, 0.6)}
# Dtypes of the weights and moments, of the arithmetic, and of the slow weights.
DTYPES = {
    "float32": ("float32", "float32", "float32"),
    "float32, arithmetic in bfloat16": ("float32", "bfloat16", "float32"),
    "bfloat16, slow weights in float32": ("bfloat16", "bfloat16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
}
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS, SEED_TO_TUNE = (0, 1, 2, 3, 4), 100

load_once = functools.cache(load)


def ways():
    """Return all ways to train, as names of the optimizer and of the dtypes."""
    # AdamW alone has no slow weights; the arithmetic alone matters as much with them.
    left_out = {("AdamW", "bfloat16, slow weights in float32")}
    left_out |= {(name, "float32, arithmetic in bfloat16") for name in OUTER if name != "AdamW"}
    return [one for one in itertools.product(OUTER, DTYPES) if one not in left_out]


def cast(params, dtype):
    """Return parameters in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def optimizer(name, slow_dtype, rate, steps):
    """Return an optimizer, whose learning rate decays to 0, and a function of its state and parameters to evaluate."""
    inner = optax.adamw(lambda count: rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2)
    if OUTER[name] is None:
        return inner, lambda state, params: params
    period, eta, mu = OUTER[name]
    momentum = {"slow_momentum": mu} if mu else {}
    return lookahead(inner, period, eta, slow_dtype=slow_dtype, **momentum), slow_params


@functools.cache
def compiled(name, dtypes, steps):
    """Return a compiled function that trains a model: parameters, state, and the weights to evaluate at the end."""
    of_weights, of_arithmetic, of_slow = DTYPES[dtypes]

    @jax.jit
    def train(rate, params, text, starts):
        rule, evaluated = optimizer(name, of_slow, rate, steps)
        params = cast(params, of_weights)

        def step(carried, starts):
            params, state = carried
            gradients = jax.grad(lambda params: loss_of(cast(params, of_arithmetic), text, starts))(params)
            updates, state = rule.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, rule.init(params)), starts)
        return params, state, evaluated(state, params)

    return train


validate = jax.jit(loss_of)


def loss(name, dtypes, rate, seed, steps):
    """Return the validation loss of a training, of the slow weights where there are any."""
    training, validation, _ = load_once()
    starts = starts_of_pieces(training, (steps, BATCH), seed)
    train = compiled(name, dtypes, steps)
    *_, weights = train(rate, initial_params(seed), jnp.asarray(training, "int8"), starts)
    held_out = starts_of_pieces(validation, 512, 0)
    return round(float(validate(cast(weights, "float32"), jnp.asarray(validation, "int8"), held_out)), 4)


def tuned(steps, rates, seeds, one):
    """Return the losses of a way to train at all rates with one seed, and at the best rate with other seeds."""
    tuning = [loss(*one, rate, SEED_TO_TUNE, steps) for rate in rates]
    rate = rates[int(np.nanargmin(tuning))]
    losses = [loss(*one, rate, seed, steps) for seed in seeds]
    return {"optimizer": one[0], "dtypes": one[1], "tuning": tuning, "rate": rate, "losses": losses}


def run(quick):
    """Return the results of the experiment."""
    # Two processes share the cores.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    steps, rates, seeds, which = 480, RATES, SEEDS, ways()
    if quick:
        steps, rates, seeds, which = 30, (4e-3,), (0,), [("AdamW", "float32"), ("Lookahead(6, 0.5)", "bfloat16")]
    *texts, digest = load()
    return {
        "text": described(*texts, digest),
        "steps": steps,
        "rates": rates,
        "seeds": seeds,
        "runs": in_processes(functools.partial(tuned, steps, rates, seeds), which),
    }


def tables(results):
    """Return the tables of the experiment's page."""
    found = {(one["optimizer"], one["dtypes"]): one for one in results["runs"]}
    rows = []
    for (name, dtypes), one in found.items():
        spread = f" ± {np.std(one['losses'], ddof=1):.3f}" if len(one["losses"]) > 1 else ""
        lost = gained = "-"
        if dtypes != "float32" and (name, "float32") in found:
            lost = in_words(paired(one["losses"], found[name, "float32"]["losses"]), 3)
        if name != "AdamW" and ("AdamW", weights_of(dtypes)) in found:
            gained = in_words(paired(one["losses"], found["AdamW", weights_of(dtypes)]["losses"]), 3)
        rows.append([name, dtypes, f"{one['rate']:g}", f"{np.mean(one['losses']):.3f}{spread}", lost, gained])
    text = results["text"]
    return {
        "losses": markdown(
            ["", "dtypes", "learning rate", "loss", "minus float32", "minus AdamW with such weights"],
            rows,
        ),
        "text": f"{text['training']:,} characters for training, {text['validation']:,} for validation (digest "
        f"{text['sha256']}), {results['steps']} steps of {BATCH} pieces of {CONTEXT} characters. Tuning: "
        f"{len(results['rates'])} learning rates with one seed for each row, then {len(results['seeds'])} other seeds "
        "at the best one.\n",
    }


def weights_of(dtypes):
    """Return the dtypes of AdamW alone whose weights are as those of a way with slow weights."""
    return "bfloat16" if dtypes.startswith("bfloat16") else dtypes


def plots(results):
    """Return the figures of the experiment's page: losses over learning rates while tuning, one panel an optimizer."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = dict(zip(OUTER, figure.subplots(1, len(OUTER), sharey=True)))
    styles = dict(zip(DTYPES, ((SLOW, "-"), (SLOW, ":"), (FAST, "-"), (BARE, "-"))))
    for one in results["runs"]:
        color, style = styles[one["dtypes"]]
        axes = panels[one["optimizer"]]
        axes.semilogx(results["rates"], one["tuning"], style, marker=".", color=color, label=one["dtypes"], linewidth=1)
        axes.legend(fontsize=7)
    for name, axes in panels.items():
        axes.set(xlabel="learning rate", title=name)
    panels["AdamW"].set_ylabel("validation loss (nats a character)")
    return {"losses": figure}


if __name__ == "__main__":
    command(sys.modules[__name__], ["lookahead-optim", "jax", "optax", "flax"])
