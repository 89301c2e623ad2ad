"""Several workers: pseudo-gradients that `reduce` averages, simulated by `vmap` and on four devices by `shard_map`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lookahead_optim.optax import lookahead, reset_slow_params, slow_params, sync
from tests import child_processes
from tests.test_optax import worker_processes
from tests.test_optax.whole_steps import FORMS, whole_step

WORKERS, PERIOD, ETA, RATE = 4, 3, 0.7, 0.1
SHAPES = {"w": (3, 4), "v": (2, 2), "b": (5,)}
mean_over_workers = functools.partial(jax.lax.pmean, axis_name="workers")
OUTER = [(0.0, True), (0.9, True), (0.5, False)]
outer_settings = pytest.mark.parametrize(("mu", "nesterov"), OUTER, ids=["plain", "nesterov", "heavy ball"])
forms = pytest.mark.parametrize("form", FORMS)


def normal(rng, dtype="float32"):
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def start_and_gradients(steps):
    rng = np.random.default_rng(0)
    return normal(rng), [[normal(rng) for _ in range(WORKERS)] for _ in range(steps)]


class ByHand:
    """All workers in float64, with SGD inside."""

    def __init__(self, start, mu, nesterov, workers=WORKERS):
        self.mu, self.nesterov, self.eta, self.count = mu, nesterov, ETA, 0
        self.slow = {name: value.astype("float64") for name, value in start.items()}
        self.b = {name: np.zeros_like(value) for name, value in self.slow.items()}
        self.workers = [dict(self.slow) for _ in range(workers)]

    def step(self, gradients):
        self.workers = [
            {name: value - RATE * gradient[name] for name, value in worker.items()}
            for worker, gradient in zip(self.workers, gradients)
        ]
        self.count += 1
        if self.count % PERIOD == 0:
            self.sync()

    def sync(self):
        for name, slow in self.slow.items():
            s = np.mean([slow - worker[name] for worker in self.workers], axis=0)
            b = self.b[name] = self.mu * self.b[name] + s
            self.slow[name] = slow - self.eta * (s + self.mu * b if self.nesterov else b)
        self.workers = [dict(self.slow) for _ in self.workers]


def by_vmap(function):
    return jax.jit(jax.vmap(function, axis_name="workers"))


def by_shard_map(function, mesh=None):
    """Return a function of trees with an axis of workers. Each worker is on its device, or on its part of a mesh."""

    def on_worker(*trees):
        results = function(*(jax.tree.map(lambda leaf: leaf[0], tree) for tree in trees))
        return jax.tree.map(lambda leaf: leaf[None], results)

    mesh = mesh or jax.make_mesh((WORKERS,), ("workers",), axis_types=(AxisType.Auto,))
    # Other axes of the mesh are the compiler's.
    mapped = jax.shard_map(on_worker, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"), axis_names={"workers"})
    return jax.jit(mapped)


ways = pytest.mark.parametrize("way", [by_vmap, by_shard_map])


def assert_close(params, workers, tolerance=1e-5):
    for name, value in params.items():
        np.testing.assert_allclose(value, np.stack([worker[name] for worker in workers]), rtol=0, atol=tolerance)


def assert_equal_on_all_workers(tree):
    for leaf in jax.tree.leaves(tree):
        assert all(np.array_equal(leaf[0], one) for one in leaf)


def settings_of(kind, mu, nesterov):
    if kind == "outer":
        return {"outer": optax.sgd(ETA, momentum=mu or None, nesterov=nesterov and mu > 0)}
    return {"slow_step_size": ETA, "slow_nesterov": nesterov, **({"slow_momentum": mu} if mu else {})}


@ways
@forms
@outer_settings
@pytest.mark.parametrize("kind", ["settings", "outer"])
def test_all_workers_restart_from_the_outer_step_with_the_mean(way, form, mu, nesterov, kind):
    start, gradients = start_and_gradients(8)
    optimizer = lookahead(optax.sgd(RATE), PERIOD, reduce=mean_over_workers, **settings_of(kind, mu, nesterov))
    by_hand, step = ByHand(start, mu, nesterov), way(whole_step(optimizer, form))
    params = stacked([start] * WORKERS)
    state = jax.vmap(optimizer.init)(params)
    for count, one in enumerate(gradients, 1):
        params, state = step(params, state, stacked(one))
        by_hand.step(one)
        assert_close(params, by_hand.workers)
        # Bit for bit, even if an addition of updates has rounded the parameters of each worker differently.
        assert_equal_on_all_workers((state.slow_params, state.outer_state))
        shown = way(slow_params)(state, params)
        assert_close(shown, [by_hand.slow] * WORKERS)
        if form == "apply_gradients" and count % PERIOD == 0:
            assert_equal_on_all_workers(params)


@forms
def test_workers_are_two_processes(form, tmp_path):
    child_processes.run_together(worker_processes, form, tmp_path, 2, timeout=120)
    found = [np.load(tmp_path / f"{form}-{rank}.npz") for rank in range(2)]
    start, gradients = start_and_gradients(8)
    by_hand = ByHand(start, 0.9, True, workers=2)
    for count, one in enumerate(gradients):
        by_hand.step(one[:2])
        for worker, expected in zip(found, by_hand.workers):
            for name, value in expected.items():
                np.testing.assert_allclose(worker[f"{name} {count}"], value, rtol=0, atol=1e-5)
    for name in SHAPES:
        np.testing.assert_allclose(found[0][f"slow {name}"], by_hand.slow[name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[0][f"momentum {name}"], by_hand.b[name], rtol=0, atol=1e-5)
        for kind in ("slow", "momentum"):
            np.testing.assert_array_equal(*(worker[f"{kind} {name}"] for worker in found))


@forms
@pytest.mark.parametrize("reduce", [None, mean_over_workers], ids=["alone", "workers"])
@outer_settings
@pytest.mark.parametrize("kind", ["settings", "outer"])
def test_a_loop_on_each_device_carries_the_state(form, reduce, mu, nesterov, kind):
    settings = {"reduce": reduce, **settings_of(kind, mu, nesterov)}
    optimizer = lookahead(optax.sgd(RATE), PERIOD, **settings)
    step = whole_step(optimizer, form)

    def cycle(params, state, gradients):
        def body(carried, gradients):
            params, state = step(*carried, gradients)
            return (params, state), slow_params(state, params)

        (params, state), shown = jax.lax.scan(body, (params, state), gradients)
        outer = settings.get("outer")
        params, state = sync(state, params, outer=outer, reduce=reduce)
        return params, reset_slow_params(state, params, outer=outer), shown

    start, gradients = start_and_gradients(7)
    params = stacked([start] * WORKERS)
    state = jax.vmap(optimizer.init)(params)
    gradients = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), stacked([stacked(one) for one in gradients]))
    found, expected = (way(cycle)(params, state, gradients) for way in (by_shard_map, by_vmap))
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


@ways
@outer_settings
def test_a_sync_by_hand_is_that_of_all_workers_and_a_second_one_changes_nothing(way, mu, nesterov):
    start, gradients = start_and_gradients(7)
    optimizer = lookahead(optax.sgd(RATE), PERIOD, reduce=mean_over_workers, **settings_of("settings", mu, nesterov))
    by_hand, step = ByHand(start, mu, nesterov), way(whole_step(optimizer, "apply_gradients"))
    params = stacked([start] * WORKERS)
    state = jax.vmap(optimizer.init)(params)
    sync_all = way(lambda state, params: sync(state, params, reduce=mean_over_workers))
    for count, one in enumerate(gradients, 1):
        params, state = step(params, state, stacked(one))
        by_hand.step(one)
        if count in (3, 5):
            if count % PERIOD:
                by_hand.sync()
            for _ in range(2):
                params, state = sync_all(state, params)
                assert_close(params, by_hand.workers)
                assert_equal_on_all_workers(params)


@forms
@pytest.mark.parametrize("kind", ["settings", "outer"])
def test_workers_communicate_once_and_in_the_branch_of_the_sync_alone(form, kind):
    optimizer = lookahead(optax.sgd(RATE), PERIOD, reduce=mean_over_workers, **settings_of(kind, 0.9, True))
    params = stacked([normal(np.random.default_rng(0))] * WORKERS)
    step = by_shard_map(whole_step(optimizer, form))
    text = step.lower(params, jax.vmap(optimizer.init)(params), params).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert text.count(" all-reduce(") == 1
    for collective in ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"):
        assert f" {collective}(" not in entry


@forms
def test_slow_weights_in_float32_take_the_mean_of_bfloat16_workers(form):
    # Only one of four workers moves, by one unit in the last place. The mean is a quarter of it.
    optimizer = lookahead(optax.sgd(1.0), 1, 0.5, slow_dtype="float32", reduce=mean_over_workers)
    params = {"w": jnp.ones((WORKERS, 3), jnp.bfloat16)}
    state = jax.vmap(optimizer.init)(params)
    gradients = {"w": jnp.zeros((WORKERS, 3), jnp.bfloat16).at[1].set(-(2.0**-7))}
    step = by_vmap(whole_step(optimizer, form))
    for count in range(1, 65):
        params, state = step(params, state, gradients)
        np.testing.assert_array_equal(state.slow_params["w"], 1 + 2.0**-10 * count)
        np.testing.assert_array_equal(params["w"], state.slow_params["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize(("mu", "eta"), [(0.0, 0.5), (0.9, 0.7), (0.6, 1.0)])
def test_workers_of_other_quadratics_meet_where_the_closed_form_says(mu, eta):
    # SGD with step g on a (x - c)^2 / 2 moves a cycle of k steps by the part q = 1 - (1 - g a)^k of the way to c. The
    # mean of all workers' moves is 0 at sum(q c) / sum(q).
    curvatures, optima = np.array([1.0, 3.0, 0.5, 2.0]), np.array([1.0, -2.0, 0.25, 3.0])
    momentum = {"slow_momentum": mu} if mu else {}
    optimizer = lookahead(optax.sgd(RATE), PERIOD, eta, reduce=mean_over_workers, **momentum)

    def cycles(params, state, curvature, optimum):
        def step(carried, _):
            params, state = carried
            params, state = optimizer.apply_gradients(curvature * (params - optimum), state, params)
            return (params, state), None

        return jax.lax.scan(step, (params, state), None, length=300 * PERIOD)[0]

    params = jnp.zeros(WORKERS)
    params, _ = by_vmap(cycles)(params, jax.vmap(optimizer.init)(params), jnp.array(curvatures), jnp.array(optima))
    q = 1 - (1 - RATE * curvatures) ** PERIOD
    np.testing.assert_allclose(params, np.sum(q * optima) / np.sum(q), rtol=1e-5)


def test_the_noise_of_one_worker_is_divided_by_the_number_of_workers():
    # The loss (x - c)^2 / 2 with c ~ N(0, 1), for many independent x at once. With one worker the variance of the slow
    # weights is 1.310041384665 times the variance of SGD, which is step / (2 - step).
    period, count, cycles = 30, 4_000, 120
    optimizer = lookahead(optax.sgd(RATE), period, 0.7, slow_momentum=0.6, reduce=mean_over_workers)

    def cycle(carried, key):
        def step(carried, key):
            params, state = carried
            gradients = params - jax.random.normal(key, params.shape)
            return optimizer.apply_gradients(gradients, state, params), None

        params, state = jax.lax.scan(step, carried, jax.random.split(key, period))[0]
        return (params, state), jnp.mean(params**2)

    def cycles_of(params, state, key):
        return jax.lax.scan(cycle, (params, state), jax.random.split(key, cycles))[1]

    params = jnp.zeros((WORKERS, count))
    keys = jax.random.split(jax.random.key(0), WORKERS)
    squares = by_vmap(cycles_of)(params, jax.vmap(optimizer.init)(params), keys)[0, 20:]
    np.testing.assert_allclose(np.mean(squares) / (RATE / (2 - RATE)), 1.310041384665 / WORKERS, rtol=0.02)


@forms
def test_a_frozen_weight_is_captured_anew(form):
    start, gradients = start_and_gradients(7)
    optimizer = lookahead(optax.sgd(RATE), PERIOD, ETA, slow_momentum=0.9, reduce=mean_over_workers)
    step = by_vmap(whole_step(optimizer, form))

    def frozen_step(params, state, gradients):
        gradients = {**gradients, "b": None}
        if form == "apply_gradients":
            return optimizer.apply_gradients(gradients, state, params)
        updates, state = optimizer.update(gradients, state, params)
        return {
            name: value if updates[name] is None else value + updates[name] for name, value in params.items()
        }, state

    params = stacked([start] * WORKERS)
    state = jax.vmap(optimizer.init)(params)
    for count, one in enumerate(gradients, 1):
        kept = params["b"]
        params, state = (by_vmap(frozen_step) if count in (5, 6) else step)(params, state, stacked(one))
        if count == 6:
            np.testing.assert_array_equal(params["b"], kept)
            np.testing.assert_array_equal(state.slow_params["b"], kept)
            assert not state.outer_state.slow_momentum["b"].any()


def test_parameters_stay_sharded_over_the_axes_of_the_model():
    # Two workers, each on two devices that share its parameters.
    mesh = jax.make_mesh((2, 2), ("workers", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer = lookahead(optax.adam(RATE), PERIOD, ETA, slow_momentum=0.9, reduce=mean_over_workers)
    specs = {"w": P("workers", None, "model"), "b": P("workers", "model")}
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)).astype("float32"), "b": rng.normal(size=6).astype("float32")}
    gradients = [
        {name: rng.normal(size=(2, *value.shape)).astype("float32") for name, value in start.items()} for _ in range(6)
    ]
    params = stacked([start] * 2)
    one_device = params, jax.vmap(optimizer.init)(params)
    sharded = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, specs)
    many_devices = sharded, jax.vmap(optimizer.init)(sharded)

    step = by_shard_map(whole_step(optimizer, "apply_gradients"), mesh)
    for one in gradients:
        one_device = by_vmap(whole_step(optimizer, "apply_gradients"))(*one_device, one)
        many_devices = step(*many_devices, jax.device_put(one, jax.tree.map(lambda leaf: leaf.sharding, sharded)))
    for name, spec in specs.items():
        np.testing.assert_allclose(many_devices[0][name], one_device[0][name], rtol=1e-5, atol=1e-6)
        for tree in (many_devices[0], many_devices[1].slow_params, many_devices[1].outer_state.slow_momentum):
            assert tree[name].sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), tree[name].ndim)


@pytest.mark.parametrize("reduce", [3, "mean", True])
def test_a_reduce_that_is_no_function_is_refused(reduce):
    with pytest.raises(TypeError, match=r"`reduce` must be a function of a tree.*Received: reduce="):
        lookahead(optax.sgd(RATE), reduce=reduce)
    with pytest.raises(TypeError, match=r"`reduce` must be a function of a tree.*Received: reduce="):
        sync(lookahead(optax.sgd(RATE)).init(jnp.ones(2)), jnp.ones(2), reduce=reduce)
