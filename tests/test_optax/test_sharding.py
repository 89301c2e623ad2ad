"""On four devices: sharded parameters keep their shardings without communication, and data-parallel training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lookahead_optim.optax import lookahead, reset_slow_params, slow_params, sync
from tests.test_optax.by_hand import ByHand, assert_close, assert_same_bits, make_grads, make_params
from tests.test_optax.training_runs import gradient, loss, make_batch
from tests.test_optax.whole_steps import FORMS, whole_step

SYNC_PERIOD, SLOW_STEP_SIZE = 3, 0.25
COLLECTIVES = ["all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast"]
INNER = {
    "momentum": lambda: optax.sgd(0.125, momentum=0.5),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
}
# The shape of the mesh, and the spec of each parameter.
LAYOUTS = {
    "one_axis": ((4,), {"w": P("x"), "v": P(None, "x"), "b": P()}),
    "two_axes": ((2, 2), {"w": P("x", "y"), "v": P("y"), "b": P("x")}),
}


def make_shardings(layout, axis_type=AxisType.Auto):
    shape, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(axis_type,) * len(shape))
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def make_matrices(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.array(rng.normal(size=size), "float32") for name, size in {"w": (8, 12), "v": (4, 8), "b": 6}.items()
    }


OUTERS = {
    "slow_momentum": {"slow_momentum": 0.5},
    "outer": {"outer": optax.sgd(0.5, momentum=0.5, nesterov=True)},
}


def wrapped(name):
    if name == "outer":
        return lookahead(INNER["momentum"](), SYNC_PERIOD, **OUTERS[name])
    return lookahead(
        INNER[name if name in INNER else "momentum"](), SYNC_PERIOD, SLOW_STEP_SIZE, **OUTERS.get(name, {})
    )


def assert_sharded(tree, shardings):
    """Assert that every leaf that belongs to a parameter has its sharding."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim:
            found.add(name := path[-1].key)
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), (path, leaf.sharding)
    assert found == set(shardings)


def assert_no_communication(lowered):
    text = lowered.compile().as_text()
    assert not [collective for collective in COLLECTIVES if collective in text]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jitted_init_shards_the_slow_params_like_the_params(layout):
    shardings = make_shardings(layout)
    params = jax.device_put(make_matrices(), shardings)
    state = jax.jit(wrapped("adamw").init)(params)
    assert_sharded(state.slow_params, shardings)
    # The bare transformation, which reads no parameters, puts all of its state on one device.
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.inner_state))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_an_explicit_mesh_jitted_init_and_step_keep_all_shardings(layout, form):
    shardings = make_shardings(layout, AxisType.Explicit)
    with jax.set_mesh(shardings["w"].mesh):
        params = jax.device_put(make_matrices(), shardings)
        state = jax.jit(wrapped("adamw").init)(params)
        assert_sharded(state, shardings)
        assert_sharded(jax.jit(whole_step(wrapped("adamw"), form))(params, state, params), shardings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layout", "axis_type", "name"),
    [
        ("one_axis", AxisType.Auto, "momentum"),
        ("two_axes", AxisType.Auto, "adamw"),
        ("two_axes", AxisType.Explicit, "momentum"),
        ("two_axes", AxisType.Auto, "slow_momentum"),
        ("one_axis", AxisType.Explicit, "slow_momentum"),
        ("two_axes", AxisType.Auto, "outer"),
    ],
)
def test_sharded_params_train_as_on_one_device_without_communication_and_keep_their_shardings(
    layout, axis_type, name, form
):
    shardings = make_shardings(layout, axis_type)
    optimizer = wrapped(name)
    step = jax.jit(whole_step(optimizer, form))
    # Products with powers of two are exact, whether or not XLA fuses them into additions.
    assert_equal = assert_close if name == "adamw" else assert_same_bits
    outer = OUTERS[name]["outer"] if name == "outer" else None
    single = make_matrices()
    params = jax.device_put(single, shardings)
    single_state, state = optimizer.init(single), optimizer.init(params)
    assert_sharded(state, shardings)
    for number in range(8):
        grads = make_grads(number, single)
        sharded_grads = jax.device_put(grads, shardings)
        params, state = step(params, state, sharded_grads)
        single, single_state = step(single, single_state, grads)
        if number == 4:
            params, state = sync(state, params, outer=outer)
            single, single_state = sync(single_state, single, outer=outer)
        if number == 6:
            state = reset_slow_params(state, params, outer=outer)
            single_state = reset_slow_params(single_state, single, outer=outer)
        slow = slow_params(state, params)
        for tree in (params, state, slow):
            assert_sharded(tree, shardings)
        assert_equal(params, single)
        assert_equal(slow, slow_params(single_state, single))
    assert_no_communication(step.lower(params, state, sharded_grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jitted_sync_reset_and_slow_params_keep_shardings_without_communication(layout):
    shardings = make_shardings(layout)
    optimizer = wrapped("momentum")
    params = jax.device_put(make_matrices(), shardings)
    state = optimizer.init(params)
    params, state = jax.jit(whole_step(optimizer))(params, state, jax.device_put(make_matrices(1), shardings))
    for function in (slow_params, sync, reset_slow_params):
        lowered = jax.jit(function).lower(state, params)
        assert_no_communication(lowered)
        results = lowered.compile()(state, params)
        assert_sharded(results, shardings)
        assert_same_bits(results, function(state, params))


def test_communication_of_the_inner_transformation_is_seen_in_the_compiled_step():
    shardings = make_shardings("one_axis")
    params = jax.device_put(make_matrices(), shardings)
    optimizer = lookahead(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)))
    step = jax.jit(whole_step(optimizer))
    with pytest.raises(AssertionError, match="all-reduce"):
        assert_no_communication(step.lower(params, optimizer.init(params), params))


def copies(tree):
    """Return the trees on each of the devices."""
    leaves, structure = jax.tree.flatten(tree)
    assert all(len(leaf.addressable_shards) == 4 for leaf in leaves)
    return [structure.unflatten([np.asarray(leaf.addressable_shards[one].data) for leaf in leaves]) for one in range(4)]


def data_parallel_step(optimizer, form):
    def step(params, state, batch):
        grads = jax.grad(lambda params: jax.lax.pmean(loss(params, batch), "devices"))(params)
        return whole_step(optimizer, form)(params, state, grads)

    return step


def with_shard_map(optimizer, form):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("devices")), "out_specs": P()}
    step = jax.jit(jax.shard_map(data_parallel_step(optimizer, form), mesh=mesh, **specs))
    return lambda tree: jax.device_put(tree, NamedSharding(mesh, P())), step, slow_params


def with_unchecked_shard_map(optimizer, form):
    def step(params, state, batch):
        grads = jax.lax.pmean(jax.grad(loss)(params, batch), "devices")
        return whole_step(optimizer, form)(params, state, grads)

    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("devices")), "out_specs": P(), "check_vma": False}
    step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    return lambda tree: jax.device_put(tree, NamedSharding(mesh, P())), step, slow_params


def with_pmap(optimizer, form):
    def step(params, state, batch):
        grads = jax.lax.pmean(jax.grad(loss)(params, batch), "devices")
        return whole_step(optimizer, form)(params, state, grads)

    replicate = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * 4))
    parallel = jax.pmap(step, axis_name="devices")

    def on_rows(params, state, batch):
        return parallel(params, state, jax.tree.map(lambda rows: rows.reshape(4, -1, *rows.shape[1:]), batch))

    return replicate, on_rows, jax.pmap(slow_params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["momentum", "slow_momentum"])
@pytest.mark.parametrize("parallel", [with_shard_map, with_unchecked_shard_map, with_pmap])
def test_data_parallel_training_is_that_on_one_device_and_its_devices_stay_the_same(parallel, form, name):
    optimizer = wrapped(name)
    slow_momentum = 0.5 if name == "slow_momentum" else 0.0
    hand = ByHand(INNER["momentum"](), make_params(), SYNC_PERIOD, SLOW_STEP_SIZE, slow_momentum)
    replicate, step, slow_of = parallel(optimizer, form)
    params, state = replicate((hand.params, optimizer.init(hand.params)))
    for number in range(2 * SYNC_PERIOD + 1):
        batch = make_batch(number)
        params, state = step(params, state, batch)
        hand.apply(gradient(hand.params, batch))
        slow = slow_of(state, params)
        first, *others = copies((params, state, slow))
        for other in others:
            assert_same_bits(other, first)
        shape_of = hand.params, hand.slow
        assert_close(jax.tree.map(lambda one, like: one.reshape(like.shape), (first[0], first[2]), shape_of), shape_of)


@pytest.mark.parametrize("form", FORMS)
def test_ensemble_with_one_member_on_each_device_of_a_shard_map_is_four_runs(form):
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    optimizer = wrapped("momentum")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    def train(params, all_grads):
        params, all_grads = jax.tree.map(lambda leaf: leaf[0], (params, all_grads))
        carry = params, optimizer.init(params)
        for number in range(7):
            carry = whole_step(optimizer, form)(
                *carry, jax.tree.map(lambda grads, number=number: grads[number], all_grads)
            )
        params, state = carry
        return jax.tree.map(lambda leaf: leaf[None], (params, slow_params(state, params)))

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    hands = [ByHand(INNER["momentum"](), make_params(seed), SYNC_PERIOD, SLOW_STEP_SIZE) for seed in range(4)]
    all_grads = [[make_grads(10 * seed + one, hand.params) for one in range(7)] for seed, hand in enumerate(hands)]
    actual = train(stack([hand.params for hand in hands]), stack([stack(grads) for grads in all_grads]))
    for hand, grads in zip(hands, all_grads):
        for one in grads:
            hand.apply(one)
    assert_close(actual, (stack([hand.params for hand in hands]), stack([hand.slow for hand in hands])))
