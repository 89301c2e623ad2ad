"""Training programs of Flax Linen, Flax NNX and Equinox, and all kinds of parameter trees."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

from lookahead_optim.optax import LookaheadTransformation, lookahead, reset_slow_params, slow_params, sync
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads
from tests.test_optax.training_runs import make_batch
from tests.test_optax.whole_steps import FORMS, snapshot, whole_step

SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.25
STEPS = 2 * SYNC_PERIOD + 2
inner = functools.partial(optax.adam, 0.05)


def wrapped(transformation=None):
    return lookahead(transformation or inner(), SYNC_PERIOD, SLOW_STEP_SIZE)


def by_hand(params, transformation=None):
    return ByHand(transformation or inner(), params, SYNC_PERIOD, SLOW_STEP_SIZE)


def squared_error(model, batch):
    inputs, targets = batch
    return jnp.mean((model(inputs) - targets) ** 2)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        return linen.Dense(4)(jnp.tanh(linen.Dense(5)(inputs)))


def jitted_linen(model):
    """Return two functions: the gradient of a model's parameters, and training with a donated state."""

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda params: squared_error(functools.partial(model.apply, {"params": params}), batch))(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, batch):
        return state.apply_gradients(grads=gradient(state.params, batch))

    return gradient, train


@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_jitted_and_donated_train_state_of_linen(container):
    model = LinenModel()
    variables = model.init(jax.random.key(0), make_batch(0)[0])
    params = (freeze if container is FrozenDict else dict)(variables["params"])
    hand = by_hand(jax.tree.map(jnp.copy, params))

    gradient, train = jitted_linen(model)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=wrapped())
    # Flax starts with a Python number, for which `jit` compiles once more.
    state = state.replace(step=jnp.array(0))
    for number in range(STEPS):
        state = train(state, make_batch(number))
        hand.apply(gradient(hand.params, make_batch(number)))
        if number == 3:
            params, state = sync(state, state.params)
            state = state.replace(params=params)
            hand.sync()
        if number == 4:
            state = reset_slow_params(state, state.params)
            hand.slow = hand.params
        slow = slow_params(state, state.params)
        assert type(slow) is type(state.params) is container
        assert_same_bits(slow, slow_params(state.opt_state, state.params))
        assert_close(state.params, hand.params)
        assert_close(slow, hand.slow)
    assert isinstance(state, TrainState)
    assert state.step == STEPS
    assert train._cache_size() == 1


class NnxModel(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.body = nnx.Linear(3, 5, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, inputs):
        return self.head(jnp.tanh(self.norm(self.body(inputs))))


NNX_FILTERS = {"all": nnx.Param, "head": nnx.All(nnx.Param, nnx.PathContains("head"))}


def nnx_step(wrt):
    @nnx.jit
    def train(model, optimizer, batch):
        optimizer.update(model, nnx.grad(squared_error, argnums=nnx.DiffState(0, wrt))(model, batch))

    return train


@pytest.mark.parametrize("wrt", NNX_FILTERS)
def test_slow_params_of_an_nnx_optimizer_can_be_put_into_a_model(wrt):
    wrt = NNX_FILTERS[wrt]
    model, other = NnxModel(), NnxModel()
    optimizer, train = nnx.Optimizer(model, wrapped(), wrt=wrt), nnx_step(wrt)
    hand = by_hand(jax.tree.map(jnp.copy, nnx.state(other, wrt)))
    gradient = nnx.jit(nnx.grad(squared_error, argnums=nnx.DiffState(0, wrt)))
    untouched = snapshot(nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt))))
    for number in range(STEPS):
        train(model, optimizer, make_batch(number))
        hand.apply(gradient(other, make_batch(number)))
        nnx.update(other, hand.params)
        params = nnx.state(model, wrt)
        slow = slow_params(optimizer.opt_state, params)
        assert_same_bits(slow, slow_params(optimizer, params))
        assert jax.tree.structure(slow) == jax.tree.structure(params) == jax.tree.structure(hand.slow)
        assert_close(params, hand.params, 1e-5)
        assert_close(slow, hand.slow, 1e-5)
    assert_same_bits(nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt))), untouched)

    fast = snapshot(params)
    nnx.update(other, hand.slow)
    graph, _, rest = nnx.split(model, wrt, ...)
    assert_close(nnx.merge(graph, slow, rest)(make_batch(0)[0]), other(make_batch(0)[0]), 1e-5)
    assert_same_bits(nnx.state(model, wrt), fast)
    nnx.update(model, slow)
    assert_close(nnx.state(model, wrt), hand.slow, 1e-5)
    # Among all parameters, the parameters that are not optimized are as in the model.
    everything = nnx.state(model, nnx.Param)
    assert jax.tree.structure(slow_params(optimizer, everything)) == jax.tree.structure(everything)
    assert_same_bits(nnx.filter_state(slow_params(optimizer, everything), nnx.Not(wrt)), untouched)


def put_back_state(model, optimizer):
    params, optimizer.opt_state = sync(optimizer.opt_state, nnx.state(model, nnx.Param))
    nnx.update(model, params)


def put_back_optimizer(model, optimizer):
    params, synced = sync(optimizer, nnx.state(model, nnx.Param))
    nnx.update(model, params)
    nnx.update(optimizer, nnx.state(synced))


@pytest.mark.parametrize("synchronize", [put_back_state, put_back_optimizer, nnx.jit(put_back_state)])
def test_sync_and_reset_of_an_nnx_optimizer(synchronize):
    model, other = NnxModel(), NnxModel()
    optimizer, train = nnx.Optimizer(model, wrapped(), wrt=nnx.Param), nnx_step(nnx.Param)
    hand = by_hand(jax.tree.map(jnp.copy, nnx.state(other, nnx.Param)))
    gradient = nnx.jit(nnx.grad(squared_error))
    for number in range(STEPS):
        train(model, optimizer, make_batch(number))
        hand.apply(gradient(other, make_batch(number)))
        if number == 1:
            synchronize(model, optimizer)
            hand.sync()
        if number == 3:
            if synchronize is put_back_optimizer:
                nnx.update(optimizer, nnx.state(reset_slow_params(optimizer, nnx.state(model, nnx.Param))))
            else:
                optimizer.opt_state = reset_slow_params(optimizer.opt_state, nnx.state(model, nnx.Param))
            hand.slow = hand.params
        nnx.update(other, hand.params)
        assert_close(nnx.state(model, nnx.Param), hand.params, 1e-5)
        assert_close(slow_params(optimizer.opt_state, nnx.state(model, nnx.Param)), hand.slow, 1e-5)


@pytest.mark.parametrize("kind", ["TrainState", "nnx.Optimizer"])
@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_a_step_with_what_holds_the_state_is_refused_with_the_remedy(kind, form):
    model, optimizer = NnxModel(), wrapped()
    params = nnx.state(model, nnx.Param)
    if kind == "TrainState":
        holder = TrainState.create(apply_fn=None, params=params, tx=optimizer)
    else:
        holder = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    received = type(holder).__name__
    with pytest.raises(ValueError, match=rf"(?s)`opt_state` of a Flax .* pass `state.opt_state`.* type {received}$"):
        getattr(optimizer, form)(params, holder, params)


class EquinoxTraining(eqx.Module):
    model: eqx.nn.MLP
    optimizer: optax.GradientTransformationExtraArgs
    state: Any

    def params(self):
        return eqx.filter(self.model, eqx.is_inexact_array)

    @eqx.filter_jit
    def step(self, batch, form):
        grads = equinox_gradient(self.model, batch)
        if form == "apply_gradients":
            params, state = self.optimizer.apply_gradients(grads, self.state, self.params())
            model = eqx.combine(params, self.model)
        else:
            updates, state = self.optimizer.update(grads, self.state, self.params())
            model = eqx.apply_updates(self.model, updates)
        return EquinoxTraining(model, self.optimizer, state)


@eqx.filter_jit
@eqx.filter_grad
def equinox_gradient(model, batch):
    return squared_error(jax.vmap(model), batch)


@pytest.mark.parametrize("form", FORMS)
def test_equinox_model_in_a_module_with_its_optimizer_that_is_partitioned_and_combined(form):
    model = eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    hand = by_hand(params)
    optimizer = wrapped()
    training = EquinoxTraining(model, optimizer, optimizer.init(params))
    for number in range(STEPS):
        arrays, rest = eqx.partition(training, eqx.is_array)
        training = eqx.combine(arrays, rest).step(make_batch(number), form)
        hand.apply(equinox_gradient(eqx.combine(hand.params, static), make_batch(number)))
        if number == 3:
            params, state = sync(training.state, training.params())
            training = EquinoxTraining(eqx.combine(params, static), training.optimizer, state)
            hand.sync()
        slow = slow_params(training.state, training.params())
        assert jax.tree.structure(slow) == jax.tree.structure(hand.slow)
        assert_close(training.params(), hand.params)
        assert_close(slow, hand.slow)
    assert isinstance(training.optimizer, LookaheadTransformation)
    assert_close(eqx.filter(slow_params(training.state, training.model), eqx.is_inexact_array), hand.slow)
    inputs = make_batch(0)[0]
    for ours, theirs in ((slow, hand.slow), (training.model, hand.params)):
        assert_close(jax.vmap(eqx.combine(ours, static))(inputs), jax.vmap(eqx.combine(theirs, static))(inputs), 1e-5)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_all_shapes_and_none_train_as_by_hand(form, jitted):
    rng = np.random.default_rng(0)
    params = {
        "scalar": jnp.array(rng.normal(), "float32"),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "nothing": {"tuple": (), "list": []},
        "many_axes": jnp.array(rng.normal(size=(2, 1, 3, 1, 2)), "float32"),
    }
    optimizer, hand = wrapped(), by_hand(params)
    state = optimizer.init(params)
    step = whole_step(optimizer, form)
    step = jax.jit(step) if jitted else step
    for number in range(STEPS):
        grads = make_grads(number, params)
        params, state = step(params, state, grads)
        hand.apply(grads)
        slow = slow_params(state, params)
        assert jax.tree.structure(slow) == jax.tree.structure(params)
        assert_close(params, hand.params)
        assert_close(slow, hand.slow)


OTHER_LEAVES = {
    "integer": (lambda: jnp.arange(2**24 - 2, 2**24 + 2), lambda: jnp.full(4, 40)),
    "boolean": (lambda: jnp.array([True, False]), lambda: jnp.zeros(2, bool)),
    "raw_key": (lambda: jax.random.PRNGKey(2**31), lambda: jnp.zeros(2, "uint32")),
    "python_integer": (lambda: 7, lambda: 40),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OTHER_LEAVES)
def test_leaf_that_is_no_weight_moves_as_with_the_bare_transformation_and_has_no_slow_step(name, form):
    make_leaf, make_grad = OTHER_LEAVES[name]
    bare = optax.sgd(0.05, momentum=0.5)
    weight = jnp.linspace(-1, 1, 3)
    hand, optimizer = by_hand({"weight": weight}, bare), wrapped(bare)
    params = bare_params = {"weight": weight, "other": make_leaf()}
    state, bare_state = optimizer.init(params), bare.init(params)
    step, bare_step = whole_step(optimizer, form), whole_step(bare)
    for number in range(STEPS):
        grads = make_grads(number, {"weight": weight}) | {"other": make_grad()}
        bare_params, bare_state = bare_step(bare_params, bare_state, grads)
        params, state = step(params, state, grads)
        hand.apply({"weight": grads["weight"]})
        assert_same_bits(params["other"], bare_params["other"])
        assert params["other"].dtype == bare_params["other"].dtype
        assert_close(params["weight"], hand.params["weight"])
        slow = slow_params(state, params)
        assert_same_bits(slow["other"], params["other"])
        assert_close(slow["weight"], hand.slow["weight"])
        assert_same_bits(sync(state, params)[0]["other"], params["other"])


@pytest.mark.parametrize("form", FORMS)
def test_parameter_without_an_update_is_left_alone(form):
    params = {"frozen": jnp.ones(2), "w": jnp.ones(2)}
    optimizer = lookahead(optax.sgd(0.1), 2)
    state = optimizer.init(params)
    for _ in range(2):
        grads = {"frozen": None, "w": jnp.ones(2)}
        if form == "apply_gradients":
            params, state = optimizer.apply_gradients(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = eqx.apply_updates(params, updates)
    assert_close(params, {"frozen": jnp.ones(2), "w": jnp.full(2, 0.9)})
    assert_same_bits(slow_params(state, params), params)


@pytest.mark.parametrize("form", FORMS)
def test_python_float_is_a_weight(form):
    params = {"float": 1.5}
    optimizer, hand = wrapped(), by_hand({"float": jnp.array(1.5)})
    state = optimizer.init(params)
    assert slow_params(state, params)["float"] == 1.5
    for number in range(STEPS):
        grads = make_grads(number, hand.params)
        params, state = whole_step(optimizer, form)(params, state, grads)
        hand.apply(grads)
        assert_close(params, hand.params)
        assert_close(slow_params(state, params), hand.slow)


def test_typed_key_cannot_be_updated_by_optax_itself_but_is_passed_through_where_it_is_not_optimized():
    params = {"weight": jnp.ones(3), "key": jax.random.key(0)}
    with pytest.raises(TypeError):
        optax.apply_updates(params, {"weight": jnp.ones(3), "key": None})
    weights = {"weight": params["weight"]}
    optimizer = wrapped()
    weights, state = whole_step(optimizer)(weights, optimizer.init(weights), weights)
    params |= weights
    synced, state = sync(state, params)
    for tree in (synced, slow_params(state, params)):
        assert tree["key"] == params["key"]
    assert_close(synced["weight"], jnp.full(3, 1 - 0.05 * SLOW_STEP_SIZE))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("params", [{}, (), {"a": [], "b": None}])
def test_tree_without_leaves(params, form):
    optimizer = wrapped()
    state = optimizer.init(params)
    for _ in range(STEPS):
        new, state = whole_step(optimizer, form)(params, state, params)
        assert new == params
    assert slow_params(state, params) == params
    assert sync(state, params)[0] == params
    assert state.step == STEPS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any
    name: str = "layer"

    def __call__(self, inputs):
        return inputs @ self.kernel + self.bias


@pytest.mark.parametrize("form", FORMS)
def test_dataclasses_train_as_by_hand(form):
    rng = np.random.default_rng(0)
    sizes = [(3, 5), (5, 4)]
    params = [Layer(jnp.array(rng.normal(size=size)), jnp.zeros(size[1]), f"layer of {size}") for size in sizes]

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return squared_error(lambda inputs: params[1](jnp.tanh(params[0](inputs))), batch)

    optimizer, hand = wrapped(), by_hand(params)
    step, state = jax.jit(whole_step(optimizer, form)), optimizer.init(params)
    for number in range(STEPS):
        params, state = step(params, state, gradient(params, make_batch(number)))
        hand.apply(gradient(hand.params, make_batch(number)))
        slow = slow_params(state, params)
        assert isinstance(slow[1], Layer)
        assert slow[1].name == "layer of (5, 4)"
        assert_close(params, hand.params)
        assert_close(slow, hand.slow)


class EquinoxModel(eqx.Module):
    """A model with leaves of all kinds: weights, integers, a function, a number, a name."""

    body: eqx.nn.MLP
    table: jax.Array
    scale: float
    name: str

    def __call__(self, inputs):
        return self.scale * self.body(inputs) + self.table[0]


def equinox_model(table):
    return EquinoxModel(eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0)), table, 2.0, "model")


INEXACT, ARRAYS = eqx.is_inexact_array, eqx.is_array


def everything(leaf):
    return True


@pytest.mark.parametrize("bare", [optax.sgd(0.05), optax.adam(0.05), optax.adamw(0.05)], ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    ("at_init", "at_update"),
    [(ARRAYS, everything), (INEXACT, everything), (INEXACT, ARRAYS), (ARRAYS, INEXACT), (everything, everything)],
    ids=["arrays_all", "inexact_all", "inexact_arrays", "arrays_inexact", "all_all"],
)
@pytest.mark.parametrize("form", FORMS)
def test_equinox_model_filtered_otherwise_at_update_than_at_init(form, at_init, at_update, bare):
    has_state = bool(jax.tree.leaves(bare.init(jnp.ones(1))))
    if at_init is everything and has_state:
        pytest.skip("A bare optimizer with state takes no functions either.")
    optimizer = lookahead(bare, SYNC_PERIOD, SLOW_STEP_SIZE)
    # It does not take integers without gradients either.
    model = equinox_model(jnp.zeros(3) if at_init is ARRAYS and has_state else jnp.arange(3))
    params, static = eqx.partition(model, INEXACT)
    hand = by_hand(params, bare)
    state = optimizer.init(eqx.filter(model, at_init))

    @eqx.filter_jit
    def step(model, state, batch):
        grads = equinox_gradient(model, batch)
        given = eqx.filter(model, at_update)
        if form == "apply_gradients":
            new, state = optimizer.apply_gradients(grads, state, given)
            return eqx.combine(new, model), state
        updates, state = optimizer.update(grads, state, given)
        return eqx.apply_updates(model, updates), state

    for number in range(STEPS):
        model, state = step(model, state, make_batch(number))
        hand.apply(equinox_gradient(eqx.combine(hand.params, static), make_batch(number)))
        slow = slow_params(state, eqx.filter(model, at_update))
        assert_close(eqx.filter(model, INEXACT), hand.params)
        assert_close(eqx.filter(slow.body, INEXACT), hand.slow.body)
        assert eqx.tree_equal(eqx.filter(model, INEXACT, inverse=True), static)
        assert_close(slow_params(state, model).table, hand.slow.table if INEXACT(model.table) else model.table)
    synced, synced_state = sync(state, model)
    hand.sync()
    assert_close(eqx.filter(synced.body, INEXACT), hand.params.body)
    assert_same_bits(eqx.filter(slow_params(synced_state, synced), ARRAYS), eqx.filter(synced, ARRAYS))
    reset = reset_slow_params(state, model)
    assert_same_bits(eqx.filter(slow_params(reset, synced).body, INEXACT), eqx.filter(model.body, INEXACT))


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_the_state_does_not_have_move_as_with_the_bare_optimizer(form):
    optimizer, bare = lookahead(optax.sgd(0.1), 2), optax.sgd(0.1)
    params = bare_params = {"w": jnp.ones(2), "added": jnp.ones(3)}
    hand, state = ByHand(bare, {"w": jnp.ones(2)}, 2), optimizer.init({"w": jnp.ones(2)})
    for number in range(5):
        grads = make_grads(number, params)
        params, state = whole_step(optimizer, form)(params, state, grads)
        hand.apply({"w": grads["w"]})
        bare_params, _ = whole_step(bare)(bare_params, bare.init(bare_params), grads)
        assert_close(params, {"w": hand.params["w"], "added": bare_params["added"]})
        assert_close(slow_params(state, params), {"w": hand.slow["w"], "added": bare_params["added"]})


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_gets_no_gradient_for_a_while_keeps_its_slow_one_until_a_sync(form):
    """A sync does not move it. From then on its slow weight is its own value."""
    optimizer, hand = lookahead(optax.sgd(0.1), 3), ByHand(optax.sgd(0.1), {"w": jnp.ones(2)}, 3)
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2)}
    state = optimizer.init(params)
    expected_fast = expected_slow = 1.0
    for number in range(1, 13):
        frozen = number in (2, 3, 5, 8)
        grads = {"w": jnp.ones(2), "frozen": None if frozen else jnp.ones(2)}
        if form == "apply_gradients":
            params, state = optimizer.apply_gradients(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = eqx.apply_updates(params, updates)
        hand.apply({"w": grads["w"]})
        expected_fast -= 0 if frozen else 0.1
        if number % 3 == 0:
            expected_slow = expected_fast = expected_fast if frozen else (expected_slow + expected_fast) / 2
        slow = slow_params(state, params)
        assert_close(params, {"w": hand.params["w"], "frozen": jnp.full(2, expected_fast)})
        assert_close(slow, {"w": hand.slow["w"], "frozen": jnp.full(2, expected_slow)})


def test_init_takes_an_abstract_nnx_model():
    optimizer = wrapped()
    abstract = nnx.state(nnx.eval_shape(NnxModel), nnx.Param)
    params = nnx.state(NnxModel(), nnx.Param)
    state, expected = optimizer.init(abstract), optimizer.init(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)
    grads = jax.tree.map(jnp.ones_like, params)
    assert_same_bits(whole_step(optimizer)(params, state, grads), whole_step(optimizer)(params, expected, grads))


@pytest.mark.parametrize("form", FORMS)
def test_an_ensemble_of_whole_equinox_models_trains_as_its_members(form):
    optimizer = lookahead(optax.sgd(0.05), SYNC_PERIOD, SLOW_STEP_SIZE)

    def step(model, state, batch):
        grads = eqx.filter_grad(lambda model: squared_error(jax.vmap(model), batch))(model)
        if form == "apply_gradients":
            return optimizer.apply_gradients(grads, state, model)
        updates, state = optimizer.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    def make(key):
        model = eqx.nn.MLP(3, 4, 5, 1, key=key)
        return model, optimizer.init(eqx.filter(model, INEXACT))

    keys = jax.random.split(jax.random.key(0), 2)
    ensemble, members = eqx.filter_vmap(make)(keys), [make(key) for key in keys]
    step_of_all = eqx.filter_jit(eqx.filter_vmap(step, in_axes=(eqx.if_array(0), eqx.if_array(0), None)))
    for number in range(STEPS):
        ensemble = step_of_all(*ensemble, make_batch(number))
        members = [step(*member, make_batch(number)) for member in members]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(eqx.filter(member, ARRAYS) for member in members))
    assert_close(eqx.filter(ensemble, ARRAYS), stacked, 1e-5)
    slow = [slow_params(state, eqx.filter(model, INEXACT)) for model, state in members]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slow)
    assert_close(slow_params(ensemble[1], eqx.filter(ensemble[0], INEXACT)), stacked, 1e-5)


# With momentum on the pseudo-gradient, by settings and by a transformation.

ETA, MU = 0.7, 0.6
OUTERS = {
    "numbers": ({"slow_step_size": ETA, "slow_momentum": MU}, None),
    "outer": ({"outer": optax.sgd(ETA, momentum=MU, nesterov=True)}, optax.sgd(ETA, momentum=MU, nesterov=True)),
}
outers = pytest.mark.parametrize("kind", OUTERS)


def momentum_by_hand(params):
    return ByHand(inner(), params, SYNC_PERIOD, ETA, MU)


@outers
def test_train_state_of_linen_with_momentum(kind):
    settings, outer = OUTERS[kind]
    model = LinenModel()
    params = model.init(jax.random.key(0), make_batch(0)[0])["params"]
    hand = momentum_by_hand(jax.tree.map(jnp.copy, params))

    gradient, train = jitted_linen(model)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=lookahead(inner(), SYNC_PERIOD, **settings))
    for number in range(STEPS):
        state = train(state, make_batch(number))
        hand.apply(gradient(hand.params, make_batch(number)))
        if number == 3:
            params, state = sync(state, state.params, outer=outer)
            state = state.replace(params=params)
            hand.sync()
        if number == 4:
            state = reset_slow_params(state, state.params, outer=outer)
            hand.reset()
        assert_close(state.params, hand.params, 1e-5)
        assert_close(slow_params(state, state.params), hand.slow, 1e-5)


@outers
@pytest.mark.parametrize("synchronize", ["state", "optimizer"])
def test_nnx_optimizer_with_momentum(kind, synchronize):
    settings, outer = OUTERS[kind]
    model, other = NnxModel(), NnxModel()
    optimizer = nnx.Optimizer(model, lookahead(inner(), SYNC_PERIOD, **settings), wrt=nnx.Param)
    train, gradient = nnx_step(nnx.Param), nnx.jit(nnx.grad(squared_error))
    hand = momentum_by_hand(jax.tree.map(jnp.copy, nnx.state(other, nnx.Param)))
    for number in range(STEPS):
        train(model, optimizer, make_batch(number))
        hand.apply(gradient(other, make_batch(number)))
        params = nnx.state(model, nnx.Param)
        if number == 3:
            if synchronize == "state":
                params, optimizer.opt_state = sync(optimizer.opt_state, params, outer=outer)
            else:
                params, synced = sync(optimizer, params, outer=outer)
                nnx.update(optimizer, nnx.state(synced))
            nnx.update(model, params)
            hand.sync()
        if number == 4:
            optimizer.opt_state = reset_slow_params(optimizer.opt_state, params, outer=outer)
            hand.reset()
        nnx.update(other, hand.params)
        assert_close(nnx.state(model, nnx.Param), hand.params, 1e-5)
        assert_close(slow_params(optimizer.opt_state, nnx.state(model, nnx.Param)), hand.slow, 1e-5)


@outers
@pytest.mark.parametrize("form", FORMS)
def test_equinox_model_with_momentum(kind, form):
    settings, outer = OUTERS[kind]
    model = eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    hand, optimizer = momentum_by_hand(params), lookahead(inner(), SYNC_PERIOD, **settings)
    training = EquinoxTraining(model, optimizer, optimizer.init(params))
    for number in range(STEPS):
        training = training.step(make_batch(number), form)
        hand.apply(equinox_gradient(eqx.combine(hand.params, static), make_batch(number)))
        if number == 3:
            # The whole model, with leaves that the state does not have.
            model, state = sync(training.state, training.model, outer=outer)
            training = EquinoxTraining(model, training.optimizer, state)
            hand.sync()
        assert_close(training.params(), hand.params, 1e-5)
        assert_close(slow_params(training.state, training.params()), hand.slow, 1e-5)


def test_equinox_model_in_half_precision_with_wide_slow_weights():
    # `eqx.apply_updates` does not round the sum to the parameter's dtype: `apply_gradients` does.
    optimizer = lookahead(optax.sgd(0.05), SYNC_PERIOD, ETA, slow_momentum=MU, slow_dtype="float32")
    model = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16") if eqx.is_inexact_array(leaf) else leaf,
        eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0)),
    )
    params = eqx.filter(model, eqx.is_inexact_array)
    training = EquinoxTraining(model, optimizer, optimizer.init(params))
    batch = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), make_batch(0))
    for number in range(1, STEPS):
        training = training.step(batch, "apply_gradients")
        assert {leaf.dtype for leaf in jax.tree.leaves(training.params())} == {jnp.dtype("bfloat16")}
        if number % SYNC_PERIOD == 0:
            rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), training.state.slow_params)
            assert_same_bits(training.params(), rounded)
