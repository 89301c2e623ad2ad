"""Every optimizer of Optax, and the main optimizers of `optax.contrib`, as inner transformation."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optax._src import alias

from lookahead_optim.optax import lookahead, reset_slow_params, slow_params, sync
from tests.test_optax.by_hand import assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.training_runs import (
    SLOW_STEP_SIZE,
    SYNC_PERIOD,
    assert_as_by_hand,
    by_hand,
    gradient,
    loss,
    make_batch,
    stepper,
)

STEPS = 2 * SYNC_PERIOD + 1

OPTIMIZERS = {
    "adabelief": {"learning_rate": 0.05},
    "adadelta": {"learning_rate": 1.0},
    "adafactor": {"learning_rate": 0.05, "min_dim_size_to_factor": 2},
    "adagrad": {"learning_rate": 0.1},
    "adam": {"learning_rate": 0.05},
    "adamax": {"learning_rate": 0.05},
    "adamaxw": {"learning_rate": 0.05, "weight_decay": 0.1},
    "adamw": {"learning_rate": 0.05, "weight_decay": 0.1},
    "adan": {"learning_rate": 0.05, "weight_decay": 0.1},
    "amsgrad": {"learning_rate": 0.05},
    "fromage": {"learning_rate": 0.05},
    "lamb": {"learning_rate": 0.05, "weight_decay": 0.1},
    "lars": {"learning_rate": 5.0, "weight_decay": 0.1},
    "lion": {"learning_rate": 0.05},
    "nadam": {"learning_rate": 0.05},
    "nadamw": {"learning_rate": 0.05, "weight_decay": 0.1},
    "noisy_sgd": {"learning_rate": 0.1, "eta": 0.1, "key": 0},
    "novograd": {"learning_rate": 0.05},
    "optimistic_adam": {"learning_rate": 0.05, "optimism": 0.05},
    "optimistic_adam_v2": {"learning_rate": 0.05},
    "optimistic_gradient_descent": {"learning_rate": 0.1},
    "radam": {"learning_rate": 0.5, "b2": 0.9},
    "rmsprop": {"learning_rate": 0.05, "momentum": 0.5, "centered": True},
    "rprop": {"learning_rate": 0.05},
    "sgd": {"learning_rate": optax.cosine_decay_schedule(0.1, 10)},
    "sign_sgd": {"learning_rate": 0.05},
    "signum": {"learning_rate": 0.05},
    "sm3": {"learning_rate": 0.1},
    "yogi": {"learning_rate": 0.05},
}
CONTRIB = {
    "acprop": {"learning_rate": 0.05},
    "ademamix": {"learning_rate": 0.05},
    "adopt": {"learning_rate": 0.05},
    "cocob": {},
    "dadapt_adamw": {"learning_rate": 1.0, "estim_lr0": 0.01},
    "dog": {"learning_rate": 1.0, "init_step": ("learning_rate", 0.05)},
    "dowg": {"learning_rate": 1.0},
    "madgrad": {"learning_rate": 0.05},
    "prodigy": {"learning_rate": 1.0, "estim_lr0": 0.01},
    "schedule_free_adamw": {"learning_rate": 0.05},
    "schedule_free_sgd": {"learning_rate": 0.1},
    "simplified_ademamix": {"learning_rate": 0.05},
}
LINE_SEARCHES = {
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)),
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
}
# Their updates need more than gradients and parameters.
WITH_EXTRA_ARGUMENTS = {
    "polyak_sgd": (lambda: optax.polyak_sgd(0.3, f_min=0.5), "value"),
    "momo": (lambda: contrib.momo(0.5), "value"),
    "momo_adam": (lambda: contrib.momo_adam(0.1), "value"),
    "reduce_on_plateau": (
        lambda: optax.chain(optax.sgd(0.5), contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.15)),
        "value",
    ),
    "sophia": (lambda: contrib.sophia(0.1, gamma=1.0, update_interval=2), "obj_fn"),
    "sam_opaque": (lambda: contrib.sam(optax.sgd(0.2, momentum=0.5), adversary(), opaque_mode=True), "grad_fn"),
    **{name: (make, "value grad value_fn") for name, make in LINE_SEARCHES.items()},
}
BATCH = make_batch(0, size=16)


def adversary():
    return optax.chain(contrib.normalize(), optax.sgd(0.05))


def with_gradients_only():
    for module, table in ((optax, OPTIMIZERS), (contrib, CONTRIB)):
        for name, arguments in table.items():
            yield pytest.param(functools.partial(getattr(module, name), **arguments), id=name)
    yield pytest.param(lambda: optax.sgd(0.1, momentum=0.9), id="momentum")
    yield pytest.param(lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), id="nesterov")
    yield pytest.param(lambda: contrib.mechanize(optax.sgd(0.1), s_init=0.1), id="mechanize")
    yield pytest.param(lambda: contrib.schedule_free(optax.adam(0.05, b1=0.0), 0.05), id="schedule_free")


@jax.jit
def objective(params):
    return loss(params, BATCH)


value_and_gradient = jax.jit(jax.value_and_grad(objective))


def excess(params):
    """Return the objective minus its minimum."""
    inputs = np.column_stack([BATCH[0], np.ones(len(BATCH[0]))])
    best = np.linalg.lstsq(inputs, np.asarray(BATCH[1]), rcond=None)[0]
    return objective(params) - objective({"w": best[:3], "b": [best[3]]})


FUNCTIONS = {"value_fn": objective, "obj_fn": objective, "grad_fn": lambda params, _: gradient(params, BATCH)}


def test_tables_have_every_optimizer_of_optax():
    def is_optimizer(name, value):
        made_here = isinstance(value, functools.partial) or (
            inspect.isfunction(value) and value.__module__ == alias.__name__
        )
        return made_here and not name.startswith("_") and getattr(optax, name, None) is value

    names = {name for name, value in vars(alias).items() if is_optimizer(name, value)}
    assert {"adam", "nadam", "yogi"} < names
    assert names <= {*OPTIMIZERS, *WITH_EXTRA_ARGUMENTS}


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make_inner", list(with_gradients_only()))
def test_lookahead_is_the_bare_optimizer_and_a_slow_step(make_inner):
    inner, first = make_inner(), make_params()
    optimizer = lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE)
    hand = by_hand(inner)
    # XLA sees one operation at a time, so nothing is rounded differently.
    hand.update, exact_step = inner.update, optimizer.apply_gradients
    exact = compiled = first, optimizer.init(first)
    compiled_step = stepper(optimizer)
    for number in range(1, STEPS + 1):
        grads = make_grads(number, first)
        hand.apply(grads)
        exact = exact_step(grads, *exact[::-1])
        compiled = compiled_step(grads, *compiled[::-1])
        for compare, (params, state) in ((assert_same_bits, exact), (assert_close, compiled)):
            compare(params, hand.params)
            compare(slow_params(state, params), hand.slow)
            if number % SYNC_PERIOD == 0:
                assert_same_bits(slow_params(state, params), params)
    assert all(np.abs(one - other).max() > 3e-3 for one, other in zip(*map(jax.tree.leaves, (first, hand.params))))


# Outside of `jit` their loops would be compiled at every step.
@pytest.mark.parametrize(("name", "arguments"), [("muon", {}), ("galore", {"rank": 2, "update_proj_gap": 2})])
def test_lookahead_is_the_bare_optimizer_with_matrix_loops_and_a_slow_step(name, arguments):
    inner = getattr(contrib, name)(learning_rate=0.05, **arguments)
    assert_as_by_hand(lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE), by_hand(inner), tolerance=1e-5)


@pytest.mark.parametrize("name", WITH_EXTRA_ARGUMENTS)
def test_extra_arguments_reach_the_inner_optimizer_in_a_minimization(name):
    make, wanted = WITH_EXTRA_ARGUMENTS[name]
    functions = {key: FUNCTIONS[key] for key in wanted.split() if key in FUNCTIONS}

    def gradients(params, _):
        value, grads = value_and_gradient(params)
        arrays = {"value": value, "grad": grads}
        return grads, {key: arrays[key] for key in wanted.split() if key in arrays}

    inner = make()
    bare = optax.GradientTransformationExtraArgs(inner.init, functools.partial(inner.update, **functions))
    hand = by_hand(bare)
    optimizer = lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE)
    step = stepper(optimizer, **functions)
    last, _ = assert_as_by_hand(optimizer, hand, 4 * SYNC_PERIOD + 1, 1e-5, gradients, step)
    assert excess(last) < 0.75 * excess(make_params())


def test_private_sgd_takes_gradients_by_example():
    inner = optax.chain(contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(2.0))
    by_example = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    hand = by_hand(inner)
    optimizer = lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE)
    last, _ = assert_as_by_hand(optimizer, hand, gradients=lambda params, step: (by_example(params, BATCH), {}))
    assert excess(last) < 0.75 * excess(make_params())


def line_search_run(optimizer, form, steps=STEPS):
    """Before every step, yield parameters, state and what `optax.value_and_grad_from_state` finds for them."""
    value_and_grad = jax.jit(optax.value_and_grad_from_state(objective))
    step = stepper(optimizer, form, value_fn=objective)
    params = make_params()
    state = optimizer.init(params)
    for _ in range(steps):
        value, grads = value_and_grad(params, state=state)
        yield params, state, (value, grads)
        params, state = step(grads, state, params, value=value, grad=grads)


def assert_true_value_and_gradient(found, params):
    assert_close(found, value_and_gradient(params), 1e-5)


@pytest.mark.parametrize(
    ("name", "form"),
    [("backtracking", "update"), ("backtracking", "apply_gradients"), ("zoom", "update"), ("lbfgs", "apply_gradients")],
)
def test_value_and_gradient_of_a_line_search_are_reused_except_after_a_sync(name, form):
    optimizer = lookahead(LINE_SEARCHES[name](), SYNC_PERIOD, SLOW_STEP_SIZE)
    for number, (params, state, found) in enumerate(line_search_run(optimizer, form)):
        assert_true_value_and_gradient(found, params)
        stored = optax.tree_utils.tree_get(state, "value")
        assert bool(jnp.isfinite(stored)) == (number % SYNC_PERIOD != 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd, search: lookahead(optax.chain(sgd, search), 6, SLOW_STEP_SIZE),
        lambda sgd, search: optax.chain(optax.identity(), lookahead(optax.chain(sgd, search), 6, SLOW_STEP_SIZE)),
        lambda sgd, search: lookahead(lookahead(optax.chain(sgd, search), 2, SLOW_STEP_SIZE), 4, SLOW_STEP_SIZE),
        lambda sgd, search: optax.chain(lookahead(sgd, 6, SLOW_STEP_SIZE), search),
    ],
    ids=["alone", "in_chain", "nested", "line_search_behind"],
)
def test_value_and_gradient_of_a_line_search_are_not_reused_after_a_sync_by_call(make):
    optimizer = make(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True))
    value_and_grad = jax.jit(optax.value_and_grad_from_state(objective))
    for params, state, found in line_search_run(optimizer, "update", 6):
        assert_true_value_and_gradient(found, params)
        synced, synced_state = sync(state, params)
        assert_true_value_and_gradient(value_and_grad(synced, state=synced_state), synced)
        best = jax.tree.map(lambda param: 0.5 * param, params)
        assert_true_value_and_gradient(value_and_grad(best, state=reset_slow_params(state, best)), best)
    assert objective(synced) != objective(params)


@pytest.mark.parametrize("steps_of_sam", [2, 3])
def test_adversarial_steps_of_sam_do_not_count(steps_of_sam):
    inner = optax.sgd(0.2, momentum=0.5)
    sam = functools.partial(contrib.sam, adv_optimizer=adversary(), sync_period=steps_of_sam)
    # The slow step is due when SAM has put the parameters back, at the end of each of its cycles.
    hand = by_hand(sam(inner), SYNC_PERIOD * steps_of_sam)
    optimizers = {
        "inside": lookahead(sam(inner), SYNC_PERIOD, SLOW_STEP_SIZE),
        "around": sam(lookahead(inner, SYNC_PERIOD, SLOW_STEP_SIZE)),
    }
    runs = {side: (hand.params, one.init(hand.params)) for side, one in optimizers.items()}
    step = {side: stepper(one) for side, one in optimizers.items()}
    for number in range(1, (2 * SYNC_PERIOD + 1) * steps_of_sam + 1):
        batch = make_batch(number)
        hand.apply(gradient(hand.params, batch))
        for side, (params, state) in runs.items():
            runs[side] = params, state = step[side](gradient(params, batch), state, params)
            assert_close(params, hand.params, 1e-5)
            if side == "inside" or number % steps_of_sam == 0:
                assert_close(slow_params(state, params), hand.slow, 1e-5)


@pytest.mark.parametrize("side", ["inside", "around"])
def test_sam_and_lookahead_can_be_scanned(side):
    if side == "inside":
        optimizer = lookahead(contrib.sam(optax.adam(0.05), adversary()), 2)
    else:
        optimizer = contrib.sam(lookahead(optax.adam(0.05), 2), adversary())

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    first = make_params()
    start = first, optimizer.init(first)
    batches = jax.tree.map(lambda *parts: jnp.stack(parts), *map(make_batch, range(1, 7)))
    scanned, _ = jax.lax.scan(step, start, batches)
    looped = start
    for number in range(1, 7):
        looped, _ = jax.jit(step)(looped, make_batch(number))
    assert_close(scanned, looped, 1e-5)
    for one, other in zip(*map(jax.tree.leaves, (scanned, start))):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
