"""Random operations on a `Lookahead`, and on two nested wrappers, compared with the same in float64 NumPy."""

import contextlib
import copy
import io
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition

from lookahead_optim.torch import Lookahead
from tests.random_operations import operation, run

COUNT, LR, MOMENTUM = 4, 0.05, 0.5
NAMES = "sync_period", "slow_step_size", "slow_momentum", "slow_nesterov", "lookahead_step", "lookahead_unsynced"
index = st.integers(0, COUNT - 1)
periods, step_sizes = st.integers(0, 4), st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.5])
momenta, nesterovs = st.sampled_from([0.0, 0.0, 0.4, 0.8]), st.booleans()
some = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT)
seeds = st.integers(0, 2**31)


def numbers(seed):
    return np.random.default_rng(seed).normal(size=(COUNT, 3))


class Model:
    """SGD with momentum and the wrappers' slow weights. Weights 0 and 1 are a group, and so are 2 and 3."""

    def __init__(self, fast, settings):
        self.fast, self.momentum = fast.copy(), [None] * COUNT
        self.frozen = [False] * COUNT
        # For each wrapper, from the inside to the outside, and each group: settings, count, and steps since a sync,
        # counted from 2.
        self.settings = [[[*one, 0, 2] for one in settings] for settings in settings]
        self.slow = [[None] * COUNT for _ in settings]
        # Slow momentum; None is 0.
        self.b = [[None] * COUNT for _ in settings]

    def of(self, level, weight):
        return self.settings[level][weight // 2]

    def step(self, gradients):
        takes_part = [not self.frozen[one] or gradients[one] is not None for one in range(COUNT)]
        for level, slow in enumerate(self.slow):
            for one in range(COUNT):
                if not self.of(level, one)[0]:
                    slow[one] = self.b[level][one] = None
                elif slow[one] is None and takes_part[one]:
                    slow[one], self.b[level][one] = self.fast[one].copy(), None
        for one, gradient in enumerate(gradients):
            if gradient is not None:
                first = self.momentum[one] is None
                self.momentum[one] = gradient.copy() if first else MOMENTUM * self.momentum[one] + gradient
                self.fast[one] = self.fast[one] - LR * self.momentum[one]
        for level, slow in enumerate(self.slow):
            for settings in self.settings[level]:
                settings[4] += 1
                settings[5] += 1
            due = [one for one in range(COUNT) if self.of(level, one)[0] and self.is_due(level, one)]
            for one in due:
                if not takes_part[one]:
                    slow[one] = self.b[level][one] = None
            self.sync(level, due)

    def is_due(self, level, one):
        period, *_, count, _ = self.of(level, one)
        return count % period == 0

    def sync(self, level, weights):
        for one in weights:
            for wrapper in range(level + 1):
                settings = self.of(wrapper, one)
                settings[5] = 2
            if self.slow[level][one] is not None:
                slow, b = self.slow[level][one], self.b[level][one]
                _, eta, mu, nesterov, *_ = self.of(level, one)
                s = slow - self.fast[one]
                b = mu * (0 if b is None else b) + s
                self.b[level][one] = b if mu else None
                slow = slow - eta * (s + mu * b if nesterov else b)
                self.fast[one] = self.slow[level][one] = slow
                for inner in self.slow[:level]:
                    inner[one] = slow if inner[one] is not None else None
            else:
                for inner in self.slow[:level]:
                    inner[one] = self.fast[one].copy() if inner[one] is not None else None

    def reset(self, has_gradient):
        for level, slow in enumerate(self.slow):
            for one in range(COUNT):
                period, *_, count, _ = settings = self.of(level, one)
                settings[5] = 2
                self.b[level][one] = None
                known = period and count and (not self.frozen[one] or has_gradient[one])
                slow[one] = self.fast[one].copy() if known else None


class Operations(RuleBasedStateMachine):
    levels = 1

    @initialize(seed=seeds, data=st.data())
    def start(self, seed, data):
        one = st.tuples(periods, step_sizes, momenta, nesterovs)
        settings = [[data.draw(one), data.draw(one)] for _ in range(self.levels)]
        self.model = Model(numbers(seed).astype("float32").astype("float64"), settings)
        self.new_optimizer()

    def new_optimizer(self, seed=None):
        values = self.model.fast if seed is None else numbers(seed)
        self.weights = [torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for value in values]
        for weight, frozen in zip(self.weights, self.model.frozen):
            weight.requires_grad_(not frozen)
        groups = [{"params": self.weights[:2]}, {"params": self.weights[2:]}]
        self.optimizer = torch.optim.SGD(groups, LR, momentum=MOMENTUM)
        self.names = []
        for level, settings in enumerate(self.model.settings):
            suffix = f"_{level + 1}" if level else ""
            self.names.append([f"{name}{suffix}" for name in NAMES])
            self.optimizer = Lookahead(self.optimizer)
            self.put_settings(level, settings)

    def put_settings(self, level, settings):
        for group, values in zip(self.optimizer.param_groups, settings):
            group.update(zip(self.names[level], values))

    def slow_of(self, level, one):
        return self.optimizer.state.get(self.weights[one], {}).get("slow_2" if level else "slow")

    def momentum_of(self, level, one):
        return self.optimizer.state.get(self.weights[one], {}).get("slow_momentum_2" if level else "slow_momentum")

    def compare(self, read=lambda weight: weight):
        for one, weight in enumerate(self.weights):
            np.testing.assert_allclose(read(weight.detach()).numpy(), self.model.fast[one], rtol=1e-5, atol=1e-5)
            for level, slows in enumerate(self.model.slow):
                slow = self.slow_of(level, one)
                assert (slow is None) == (slows[one] is None)
                if slow is not None:
                    np.testing.assert_allclose(slow.numpy(), slows[one], rtol=1e-5, atol=1e-5)
                b, expected = self.momentum_of(level, one), self.model.b[level][one]
                np.testing.assert_allclose(
                    0 if b is None else b.numpy(), 0 if expected is None else expected, rtol=1e-5, atol=1e-5
                )
        for level, settings in enumerate(self.model.settings):
            for group, values in zip(self.optimizer.param_groups, settings):
                assert [group[name] for name in self.names[level]] == values

    def set_gradients(self, seed, which):
        gradients = [one if has else None for one, has in zip(numbers(seed).astype("float32"), which)]
        for weight, gradient in zip(self.weights, gradients):
            weight.grad = None if gradient is None else torch.tensor(gradient, dtype=weight.dtype)
        return [None if one is None else one.astype("float64") for one in gradients]

    @operation(seed=seeds, which=some, times=st.integers(1, 4))
    def step(self, seed, which, times):
        for count in range(times):
            gradients = self.set_gradients(seed + count, which)
            self.optimizer.step()
            self.model.step(gradients)
            self.compare()

    @operation(seed=seeds, which=some)
    def step_in_a_closure(self, seed, which):
        # Frozen weights get no gradients from a closure: which weights take part is decided before it is called.
        which = [has and not frozen for has, frozen in zip(which, self.model.frozen)]
        self.set_gradients(seed, [False] * COUNT)
        gradients = []
        self.optimizer.step(lambda: gradients.extend(self.set_gradients(seed, which)))
        self.model.step(gradients)
        self.compare()

    @operation(seed=seeds, which=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).filter(any))
    def skipped_step(self, seed, which):
        self.set_gradients(seed, which)
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad[0] = float("inf")
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))
        scaler.step(self.optimizer)
        scaler.update()
        self.compare()

    @operation(one=index)
    def freeze_or_unfreeze(self, one):
        self.model.frozen[one] = not self.model.frozen[one]
        self.weights[one].requires_grad_(not self.model.frozen[one])
        self.weights[one].grad = None

    @operation(
        level=st.integers(0, 1),
        group=st.integers(0, 1),
        new=st.tuples(periods, step_sizes, momenta, nesterovs),
    )
    def change_settings(self, level, group, new):
        settings = self.model.settings[level % self.levels]
        settings[group][:4] = new
        self.put_settings(level % self.levels, settings)

    @operation(
        name=st.integers(0, 5), bad=st.sampled_from([-1, 2.5, "x", None, True, float("nan"), torch.tensor([1, 2])])
    )
    def bad_setting(self, name, bad):
        # A step size may be a fraction, and Nesterov's momentum true.
        if (name == 1 and isinstance(bad, float) and bad > 0) or (name == 3 and bad is True):
            return
        settings = self.model.settings[-1]
        self.optimizer.param_groups[1][self.names[-1][name]] = bad
        self.set_gradients(0, [True] * COUNT)
        with pytest.raises((TypeError, ValueError), match="must be"):
            self.optimizer.step()
        self.put_settings(-1, settings)
        self.compare()

    @operation(one=index, seed=seeds)
    def load_a_weight(self, one, seed):
        value = numbers(seed)[one].astype("float32")
        with torch.no_grad():
            self.weights[one].copy_(torch.tensor(value))
        self.model.fast[one] = value.astype("float64")

    @operation(times=st.integers(1, 2))
    def sync(self, times):
        for _ in range(times):
            self.optimizer.sync()
            level = self.levels - 1
            settings = [self.model.of(level, one) for one in range(COUNT)]
            has_work = [period and (not mu or unsynced > 2) for period, _, mu, _, _, unsynced in settings]
            self.model.sync(level, [one for one in range(COUNT) if has_work[one]])
            self.compare()

    @operation()
    def reset_slow_weights(self):
        self.optimizer.reset_slow_weights()
        self.model.reset([one.grad is not None for one in self.weights])
        self.compare()

    @operation(fails=st.booleans(), spoils=st.booleans())
    def block(self, fails, spoils):
        before = [one.detach().clone() for one in self.weights]
        try:
            with self.optimizer.slow_weights(), self.optimizer.slow_weights():
                for one, weight in enumerate(self.weights):
                    slow = self.model.slow[-1][one]
                    expected = self.model.fast[one] if slow is None else slow
                    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
                for refused in (self.optimizer.step, self.optimizer.sync, self.optimizer.reset_slow_weights):
                    with pytest.raises(RuntimeError, match="inside a `slow_weights"):
                        refused()
                if spoils:
                    with torch.no_grad():
                        for weight in self.weights:
                            weight.fill_(7)
                if fails:
                    raise KeyError("on purpose")
        except KeyError:
            assert fails
        assert all(map(torch.equal, before, self.weights))
        self.compare()

    @operation(anew=st.booleans(), in_block=st.booleans())
    def save_and_load(self, anew, in_block):
        file = io.BytesIO()
        with self.optimizer.slow_weights() if in_block else contextlib.nullcontext():
            torch.save((self.optimizer.state_dict(), [one.detach() for one in self.weights]), file)
        file.seek(0)
        saved, values = torch.load(file, weights_only=True)
        if anew:
            self.new_optimizer(seed=0)
        parts = [lambda: self.optimizer.load_state_dict(saved), lambda: self.load_weights(values)]
        # A state that was saved in a block, and loaded in the other order, waits for a forward pass.
        for load in reversed(parts) if in_block else parts:
            load()
        # Slow weights that a file leaves out, because they did not move, are captured again at the next step.
        for one in range(COUNT):
            others = [self.model.momentum[other] is not None for other in range(one // 2 * 2, one // 2 * 2 + 2)]
            for level, slow in enumerate(self.model.slow):
                is_left_out = self.slow_of(level, one) is None and slow[one] is not None
                if is_left_out:
                    assert self.model.momentum[one] is None
                    assert any(others) or level
                    np.testing.assert_allclose(slow[one], self.model.fast[one], atol=1e-6)
                    slow[one] = self.model.b[level][one] = None
        self.compare()

    @torch.no_grad()
    def load_weights(self, values):
        for weight, value in zip(self.weights, values):
            weight.copy_(value)

    @operation()
    def deepcopy(self):
        self.weights, self.optimizer = copy.deepcopy((self.weights, self.optimizer))
        self.compare()

    @operation()
    def zero_all_moments(self):
        for entries in self.optimizer.state.values():
            for value in entries.values():
                if torch.is_tensor(value):
                    value.zero_()
        self.model.momentum = [None if one is None else one * 0 for one in self.model.momentum]
        self.model.b = [[None] * COUNT for _ in self.model.slow]
        self.compare()

    @operation(how=st.sampled_from(["assigned", "setstate", "cleared"]), back=st.booleans())
    def new_state(self, how, back):
        kept = copy.copy(self.optimizer.state) if how == "cleared" else self.optimizer.state
        if how == "assigned":
            self.optimizer.state = defaultdict(dict)
        elif how == "setstate":
            self.optimizer.__setstate__({"state": defaultdict(dict)})
        else:
            self.optimizer.state.clear()
        assert len(self.optimizer.state) == 0
        if back:
            self.optimizer.state = kept
        else:
            self.model.momentum = [None] * COUNT
            self.model.slow, self.model.b = ([[None] * COUNT for _ in self.model.slow] for _ in range(2))
        self.compare()

    @operation(one=index)
    def replace_a_parameter(self, one):
        old = self.weights[one]
        new = torch.nn.Parameter(old.detach() + 1, requires_grad=old.requires_grad)
        entries = self.optimizer.state.pop(old, None)
        group = self.optimizer.param_groups[one // 2]
        group["params"][one % 2] = self.weights[one] = new
        if entries is not None:
            self.optimizer.state[new] = entries
        self.model.fast[one] = self.model.fast[one] + 1
        # Another parameter has a slow weight, so this parameter is known to be new.
        for level, slow in enumerate(self.model.slow):
            if self.slow_of(level, one) is not None:
                assert not any(other is not None for place, other in enumerate(slow) if place != one)
                del self.optimizer.state[new]["slow_2" if level else "slow"]
            elif self.momentum_of(level, one) is not None:
                # The slow weight of the former parameter. The capture drops it.
                del self.optimizer.state[new]["slow_momentum_2" if level else "slow_momentum"]
            slow[one] = self.model.b[level][one] = None
        self.compare()

    @operation()
    def to_double_and_back(self):
        for weight in self.weights:
            weight.data, weight.grad = weight.data.double(), None
        with self.optimizer.slow_weights():
            pass
        for weight in self.weights:
            weight.data = weight.data.float()
        self.compare()

    @precondition(lambda self: hasattr(self, "optimizer"))
    @operation()
    def plain_data(self):
        for group in self.optimizer.param_groups:
            assert all(type(group[name]) in (int, float, bool) for names in self.names for name in names)


class NestedOperations(Operations):
    levels = 2


@pytest.mark.parametrize("machine", [Operations, NestedOperations])
def test_random_operations(machine):
    run(machine, examples=150, steps=25)
