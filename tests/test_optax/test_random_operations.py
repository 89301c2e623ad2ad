"""Random operations on optimizers of all structures, against a model in float64."""

import copy
import functools
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from hypothesis import stateful
from hypothesis import strategies as st

from lookahead_optim.optax import lookahead, reset_slow_params, slow_params, sync
from tests import random_operations
from tests.random_operations import operation

LEARNING_RATE, MOMENTUM, MICRO_STEPS = 0.125, 0.5, 2
NAMES = ("w", "b")
# The outer step: without momentum, with it, or by a transformation.
SLOW_MOMENTUM = 0.5
OUTER = optax.sgd(0.5, momentum=SLOW_MOMENTUM, nesterov=True)
OUTERS = {"plain": {}, "momentum": {"slow_momentum": SLOW_MOMENTUM}, "outer": {"outer": OUTER}}
END = 2**31 - 1


class Plain:
    """SGD in Lookahead wrappers, the innermost first."""

    def __init__(self, weights, has_momentum, slow_step_sizes, outer):
        self.fast, self.momentum, self.outer = weights, MOMENTUM if has_momentum else 0.0, outer
        self.velocity = {name: np.zeros_like(one) for name, one in weights.items()}
        self.start(slow_step_sizes)

    def start(self, slow_step_sizes):
        self.slow = [self.fast for _ in slow_step_sizes]
        self.slow_momentum = [self.no_momentum() for _ in slow_step_sizes]
        self.captured, self.count = [False] * len(self.slow), [0] * len(self.slow)
        self.next_slow_step_size = list(slow_step_sizes)

    def update(self, gradients, settings):
        for level, captured in enumerate(self.captured):
            if not captured:
                self.slow[level] = self.fast
        moving = [name for name in self.fast if gradients[name] is not None]
        self.fast = dict(self.fast)
        for name in moving:
            self.velocity[name] = gradients[name] + self.momentum * self.velocity[name]
            self.fast[name] = self.fast[name] - LEARNING_RATE * self.velocity[name]
        for level, (period, slow_step_size) in enumerate(settings[: len(self.slow)]):
            count = self.count[level]
            self.count[level] = count + 1 if count < END else END + 1 - max(period, 1)
            is_due = period > 0 and self.count[level] % period == 0
            if is_due:
                self.restart(level, slow_step_size, moving)
            self.captured[level] = not is_due and period > 0
            if not period:
                self.slow_momentum[level] = self.no_momentum()

    def no_momentum(self):
        return {name: np.zeros_like(one) for name, one in self.fast.items()}

    def restart(self, level, slow_step_size, names):
        slow, before, factor = self.slow[level], self.slow_momentum[level], SLOW_MOMENTUM
        if self.outer == "plain":
            factor = 0.0
        if self.outer == "outer":
            slow_step_size = 0.5
        pseudo_gradients = {name: slow[name] - self.fast[name] if name in names else 0.0 for name in slow}
        momentum = {name: factor * before[name] + one for name, one in pseudo_gradients.items()}
        moved = {
            name: slow[name] - slow_step_size * (pseudo_gradients[name] + factor * momentum[name]) for name in names
        }
        if self.outer == "momentum":
            # The momentum of frozen weights.
            momentum |= {name: 0.0 * one for name, one in momentum.items() if name not in names}
        self.fast, self.slow_momentum[level] = self.fast | moved, momentum
        self.captured[: level + 1] = [False] * (level + 1)

    def sync(self):
        if any(self.captured):
            level = self.outermost_captured()
            self.restart(level, self.next_slow_step_size[level], self.fast)

    def reset(self):
        if self.slow:
            self.slow[-1], self.slow_momentum[-1] = self.fast, self.no_momentum()
            self.captured = [False] * (len(self.slow) - 1) + [True]

    def outermost_captured(self):
        return max(level for level, captured in enumerate(self.captured) if captured)

    def slow_weights(self):
        return self.slow[self.outermost_captured()] if any(self.captured) else self.fast


def make(structure, has_momentum, outer, settings):
    """Return an optimizer with two pairs of settings, of which most structures use one."""
    (period, slow_step_size), (other_period, other_slow_step_size) = settings
    if outer == "outer":
        slow_step_size = other_slow_step_size = 0.5
    wrap = functools.partial(lookahead, **OUTERS[outer])
    injected = functools.partial(
        optax.inject_hyperparams(lookahead, "slow_step_size" if outer == "outer" else ()), **OUTERS[outer]
    )
    inner = optax.sgd(LEARNING_RATE, momentum=MOMENTUM if has_momentum else None)
    if structure.endswith("inside"):
        around = {
            "multi_steps_inside": lambda: optax.MultiSteps(inner, MICRO_STEPS),
            "finite_inside": lambda: optax.apply_if_finite(inner, 10**6),
        }
        return wrap(around[structure](), period, slow_step_size)
    one = wrap(inner, period, slow_step_size)
    other = wrap(inner, other_period, other_slow_step_size)
    masks = {"w": True, "b": False}, {"w": False, "b": True}
    return {
        "alone": lambda: one,
        "chain": lambda: optax.chain(optax.identity(), one, optax.identity()),
        "masked": lambda: optax.chain(optax.masked(one, masks[0]), optax.masked(inner, masks[1])),
        "partition": lambda: optax.partition({"one": one, "other": other}, {"w": "one", "b": "other"}),
        "multi_steps_around": lambda: optax.MultiSteps(one, MICRO_STEPS).gradient_transformation(),
        "finite_around": lambda: optax.apply_if_finite(one, 10**6),
        "nested": lambda: wrap(one, other_period, other_slow_step_size),
        "injected": lambda: injected(inner, period, slow_step_size),
    }[structure]()


# Twice, as this structure has the most states.
STRUCTURES = ["alone", "chain", "masked", "partition", "nested", "nested", "injected"]
STRUCTURES += [f"{wrapper}_{side}" for wrapper in ("multi_steps", "finite") for side in ("inside", "around")]
# Structures whose outermost transformation is a `lookahead`.
WITH_APPLY_GRADIENTS = ["alone", "nested", "multi_steps_inside", "finite_inside"]
# With several `lookahead`s: the parameters of each. Otherwise one has all.
PARTS = {"masked": ["w"], "partition": ["w", "b"]}


def make_step(structure, has_momentum, outer, form, settings):
    optimizer = make(structure, has_momentum, outer, settings)

    def step(params, state, grads):
        if form == "apply_gradients":
            return optimizer.apply_gradients(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        moved = jax.tree.map(
            lambda param, update: param if update is None else optax.apply_updates(param, update), params, updates
        )
        return moved, state

    return step


@functools.cache
def compiled_step(structure, has_momentum, outer, form, settings=None):
    """Return a step of parameters, state and gradients, and of settings if none are given."""
    if settings is not None:
        return jax.jit(make_step(structure, has_momentum, outer, form, settings))

    @jax.jit
    def step(params, state, grads, settings):
        return make_step(structure, has_momentum, outer, form, settings)(params, state, grads)

    return step


def through_npz(tree, like, folder):
    file, leaves = io.BytesIO(), jax.tree.leaves(tree)
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as loaded:
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[f"arr_{index}"] for index in range(len(leaves))])


def through_orbax(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / str(len(list(folder.iterdir()))), tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(max(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns), like)


FORMATS = {
    "npz": through_npz,
    "msgpack": lambda tree, like, folder: serialization.from_bytes(like, serialization.to_bytes(tree)),
    "pickle": lambda tree, like, folder: pickle.loads(pickle.dumps(tree)),
    "deepcopy": lambda tree, like, folder: copy.deepcopy(tree),
    "orbax": through_orbax,
}

eighths = st.integers(-8, 8).map(lambda one: one / 8)
gradients = st.fixed_dictionaries(
    {"w": st.lists(eighths, min_size=2, max_size=2), "b": st.lists(eighths, min_size=1, max_size=1)}
)
pairs = st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5]))


class Operations(stateful.RuleBasedStateMachine):
    folder = None

    @stateful.initialize(
        structure=st.sampled_from(STRUCTURES),
        has_momentum=st.booleans(),
        outer=st.sampled_from(sorted(OUTERS)),
        settings=st.tuples(pairs, pairs),
        is_jitted=st.booleans(),
        is_traced=st.booleans(),
    )
    def start(self, structure, has_momentum, outer, settings, is_jitted, is_traced):
        self.structure, self.has_momentum, self.is_jitted, self.outer = structure, has_momentum, is_jitted, outer
        # Arguments that `sync` and `reset_slow_params` need.
        self.given = {"outer": OUTERS[outer]["outer"]} if outer == "outer" else {}
        self.is_traced, self.settings = is_traced, settings
        weights = {"w": np.array([1.0, -2.0]), "b": np.array([0.5])}
        self.params = {name: jnp.array(one, "float32") for name, one in weights.items()}
        # With a period that is not 0, as a state that is made with 0 has no room for slow parameters.
        self.optimizer = make(structure, has_momentum, outer, [(max(period, 1), size) for period, size in settings])
        self.state = self.optimizer.init(self.params)
        parts = PARTS.get(structure, [NAMES])
        self.parts = []
        for index, names in enumerate(parts):
            sizes = [settings[index][1]] if structure != "nested" else [size for _, size in settings]
            part = {name: weights[name] for name in names}
            self.parts.append((index, Plain(part, has_momentum, sizes, outer)))
        rest = {name: weights[name] for name in NAMES if not any(name in names for names in parts)}
        self.parts.append((len(parts), Plain(rest, has_momentum, [], outer)))
        self.accumulated, self.saved = [], None
        self.inject(settings[0])

    def inject(self, pair):
        if self.structure == "injected":
            # In a new tree: the old one may have been kept.
            self.state = jax.tree.map(lambda leaf: leaf, self.state)
            for name, value in zip(("sync_period", "slow_step_size"), pair):
                if name not in self.state.hyperparams:
                    continue
                self.state.hyperparams[name] = jnp.asarray(value, self.state.hyperparams[name].dtype)

    def step(self, grads, form):
        form = form if self.structure in WITH_APPLY_GRADIENTS else "update"
        leaves = {name: None if one is None else jnp.array(one, "float32") for name, one in grads.items()}
        key, arguments = (self.structure, self.has_momentum, self.outer, form), (self.params, self.state, leaves)
        # With `inject_hyperparams` the settings are in the state.
        settings = ((1, 0.5), (1, 0.5)) if self.structure == "injected" else self.settings
        if not self.is_jitted:
            made = jax.tree.map(jnp.asarray, settings) if self.is_traced else settings
            self.params, self.state = make_step(*key, made)(*arguments)
        elif self.is_traced:
            self.params, self.state = compiled_step(*key)(*arguments, settings)
        else:
            self.params, self.state = compiled_step(*key, settings)(*arguments)

    def train_once(self, grads, form):
        self.step(grads, form)
        self.step_of_models(grads)

    def step_of_models(self, grads):
        is_inside = self.structure.endswith("inside")
        is_finite = all(np.isfinite(one).all() for one in grads.values() if one is not None)
        is_skipped = self.structure.startswith("finite") and not is_finite
        if self.structure.startswith("multi_steps"):
            self.accumulated.append(grads)
            is_skipped = len(self.accumulated) < MICRO_STEPS
            if not is_skipped:
                grads = {name: sum(one[name] for one in self.accumulated) / MICRO_STEPS for name in grads}
                self.accumulated = []
        for index, model in self.parts:
            if is_inside or not is_skipped:
                sizes = [size for _, size in self.settings[index:]]
                model.next_slow_step_size = sizes[: len(model.slow)]
            if not is_skipped:
                model.update(grads, self.settings[index:])

    @operation(grads=gradients, form=st.sampled_from(["update", "apply_gradients"]), times=st.integers(1, 4))
    def train(self, grads, form, times):
        grads = {name: np.array(one) for name, one in grads.items()}
        for _ in range(times):
            self.train_once(grads, form)

    @operation(seed=st.integers(0, 9), times=st.integers(1, 9))
    def train_on(self, seed, times):
        rng = np.random.default_rng(seed)
        for _ in range(times):
            self.train_once({name: rng.integers(-8, 9, len(one)) / 8 for name, one in self.params.items()}, "update")

    @stateful.precondition(lambda self: not self.has_momentum and self.structure in ("alone", "chain", "nested"))
    @operation(grads=gradients, form=st.sampled_from(["update", "apply_gradients"]), frozen=st.sampled_from(NAMES))
    def train_with_a_frozen_weight(self, grads, form, frozen):
        grads = {name: np.array(one) for name, one in grads.items()} | {frozen: None}
        self.train_once(grads, form)

    @stateful.precondition(lambda self: self.structure.startswith("finite"))
    @operation(form=st.sampled_from(["update", "apply_gradients"]), bad=st.sampled_from([np.nan, np.inf]))
    def skip(self, form, bad):
        grads = {"w": np.array([1.0, bad]), "b": np.array([1.0])}
        self.train_once(grads, form)

    @stateful.precondition(lambda self: not self.has_momentum and self.structure in ("alone", "chain", "injected"))
    @operation(form=st.sampled_from(["update", "apply_gradients"]))
    def train_with_nan_and_return_to_the_slow_weights(self, form):
        (_, model), *_ = self.parts
        before = slow_params(self.state, self.params)
        grads = {"w": np.array([np.nan, np.nan]), "b": np.array([np.nan])}
        self.train_once(grads, form)
        period = self.settings[0][0]
        is_kept = model.captured[0]
        if is_kept:
            jax.tree.map(np.testing.assert_array_equal, slow_params(self.state, self.params), before)
        assert is_kept == (period > 0 and model.count[0] % period != 0)
        self.params = before
        self.state = reset_slow_params(self.state, self.params, **self.given)
        model.fast = {name: np.array(one, "float64") for name, one in before.items()}
        model.velocity = {name: np.zeros_like(one) for name, one in model.fast.items()}
        model.reset()

    @operation(is_jitted=st.booleans())
    def synchronize(self, is_jitted):
        run = functools.partial(sync, **self.given)
        self.params, self.state = (jax.jit(run) if is_jitted else run)(self.state, self.params)
        again, _ = run(self.state, self.params)
        jax.tree.map(np.testing.assert_array_equal, again, self.params)
        for _, model in self.parts:
            model.sync()

    @operation(seed=st.integers(0, 3), is_loaded=st.booleans())
    def reset(self, seed, is_loaded):
        """Capture the slow parameters again, also from other parameters."""
        if is_loaded:
            self.load_weights(seed)
        self.state = reset_slow_params(self.state, self.params, **self.given)
        for _, model in self.parts:
            model.reset()

    @operation(seed=st.integers(0, 3))
    def load_weights(self, seed):
        loaded = {
            name: np.round(8 * np.random.default_rng(seed).normal(size=len(one))) / 8
            for name, one in self.params.items()
        }
        self.params = {name: jnp.array(one, "float32") for name, one in loaded.items()}
        for _, model in self.parts:
            model.fast = {name: loaded[name] for name in model.fast}

    @operation(settings=st.tuples(pairs, pairs))
    def change_settings(self, settings):
        self.settings = settings
        self.inject(settings[0])

    @operation(is_jitted=st.booleans(), is_traced=st.booleans())
    def change_mode(self, is_jitted, is_traced):
        self.is_jitted, self.is_traced = is_jitted, is_traced

    @operation(name=st.sampled_from(sorted(FORMATS)))
    def save_and_load_anew(self, name):
        optimizer = make(self.structure, self.has_momentum, self.outer, ((1, 0.5), (1, 0.5)))
        like = {"params": self.params, "state": optimizer.init(self.params)}
        loaded = FORMATS[name]({"params": self.params, "state": self.state}, like, self.folder)
        jax.tree.map(np.testing.assert_array_equal, loaded, {"params": self.params, "state": self.state})
        self.params, self.state = loaded["params"], loaded["state"]

    @stateful.precondition(lambda self: self.saved is None)
    @operation()
    def keep(self):
        """Keep a state to which the run returns later. Nothing may change it."""
        kept = self.params, self.state, self.parts, self.settings, self.accumulated
        self.saved = jax.tree.map(jnp.copy, (self.params, self.state)), kept[:2], copy.deepcopy(kept[2:])

    @stateful.precondition(lambda self: self.saved is not None)
    @operation()
    def return_to_what_was_kept(self):
        copied, (self.params, self.state), rest = self.saved
        jax.tree.map(np.testing.assert_array_equal, (self.params, self.state), copied)
        self.parts, self.settings, self.accumulated = rest
        self.saved = None

    @operation(before=st.integers(0, 5))
    def let_the_count_be_near_its_end(self, before):
        self.state = optax.tree.set(self.state, step=jnp.int32(END - before))
        for _, model in self.parts:
            model.count = [END - before for _ in model.count]

    @stateful.precondition(lambda self: self.structure == "alone")
    @operation()
    def leave_lookahead_and_come_back(self):
        settings = [(1, self.settings[0][1]), (1, 0.5)]
        state = make("alone", self.has_momentum, self.outer, settings).init(self.params)
        self.state = state._replace(inner_state=self.state.inner_state)
        for index, model in self.parts:
            model.start([size for _, size in self.settings[index:]][: len(model.slow)])

    @stateful.invariant()
    def is_as_the_model(self):
        slow = slow_params(self.state, self.params)
        for _, model in self.parts:
            for actual, expected in ((self.params, model.fast), (slow, model.slow_weights())):
                for name, one in expected.items():
                    np.testing.assert_allclose(actual[name], one, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1:UserWarning")
def test_random_operations_go_as_in_the_model(tmp_path):
    Operations.folder = tmp_path
    random_operations.run(Operations, examples=40, steps=25)
