"""Refused arguments and calls, their messages, and that a refused call changes nothing."""

import copy
import re

import numpy as np
import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients

NAN, INF = float("nan"), float("inf")
BAD_SETTINGS = [
    ("sync_period", 2.5, TypeError, r"`sync_period` must be an integer.*Received: sync_period=2\.5 of type float"),
    ("sync_period", 6.0, TypeError, r"Received: sync_period=6\.0 of type float"),
    ("sync_period", True, TypeError, r"Received: sync_period=True of type bool"),
    ("sync_period", "6", TypeError, r"Received: sync_period='6' of type str"),
    ("sync_period", None, TypeError, r"Received: sync_period=None of type NoneType"),
    ("sync_period", NAN, TypeError, r"Received: sync_period=nan of type float"),
    ("sync_period", torch.tensor(6), TypeError, r"Received: sync_period=tensor\(6\) of type Tensor"),
    ("sync_period", -1, ValueError, r"`sync_period` must be 0 .* or a positive.*Received: sync_period=-1"),
    ("slow_step_size", "0.5", TypeError, r"`slow_step_size` must be a real number.*Received: slow_step_size='0\.5'"),
    ("slow_step_size", True, TypeError, r"Received: slow_step_size=True of type bool"),
    ("slow_step_size", None, TypeError, r"Received: slow_step_size=None of type NoneType"),
    ("slow_step_size", 1j, TypeError, r"Received: slow_step_size=1j of type complex"),
    ("slow_step_size", torch.tensor(0.5), TypeError, r"Received: slow_step_size=tensor\(0\.5000\) of type Tensor"),
    ("slow_step_size", -3, ValueError, r"`slow_step_size` must be finite and >= 0.*Received: slow_step_size=-3"),
    ("slow_step_size", -0.1, ValueError, r"Received: slow_step_size=-0\.1"),
    ("slow_step_size", NAN, ValueError, r"Received: slow_step_size=nan"),
    ("slow_step_size", INF, ValueError, r"Received: slow_step_size=inf"),
    ("slow_step_size", -INF, ValueError, r"Received: slow_step_size=-inf"),
]
bad_settings = pytest.mark.parametrize(("name", "value", "error", "message"), BAD_SETTINGS)


def comparable(value):
    """Return a copy in which each tensor is a list of its numbers, its dtype and its shape."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(one) for one in value]
    return value


class Trained:
    """A `Lookahead` around Adam in the middle of a cycle, next to the same training by hand."""

    def __init__(self, nested=False):
        self.fast, expected = (parameters((4,), (2, 3), (3,)) for _ in range(2))
        self.optimizer = Lookahead(self.adam(self.fast), 3, 0.25)
        if nested:
            # This group never reaches its first sync.
            self.optimizer = Lookahead(self.optimizer, 100)
        self.hand = ByHand(self.adam(expected), 3, 0.25)
        self.train(5)
        self.before = self.everything()

    @staticmethod
    def adam(parameters):
        return torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}], 0.05)

    def train(self, steps):
        for step in range(self.hand.steps + 1, self.hand.steps + 1 + steps):
            set_gradients(self.fast, step)
            set_gradients(self.hand.parameters, step)
            self.hand.step()
            self.optimizer.step()
            assert_same_bits(self.fast, self.hand.parameters)

    def everything(self):
        return comparable([self.fast, self.optimizer.state_dict(), self.optimizer.param_groups])

    def assert_unchanged_and_able_to_train(self):
        assert self.everything() == self.before
        self.train(5)


@pytest.mark.parametrize(
    ("optimizer", "received"),
    [
        (None, "optimizer=None of type NoneType"),
        (0.1, "optimizer=0.1 of type float"),
        ("sgd", "optimizer='sgd' of type str"),
        (torch.optim.SGD, "optimizer=<class 'torch.optim.sgd.SGD'> of type type"),
        (parameters((1,)), "requires_grad=True)] of type list"),
        ([torch.optim.SGD(parameters((1,)))], "of type list"),
        (torch.nn.Linear(1, 1), "of type Linear"),
    ],
    ids=["none", "number", "name", "class", "parameters", "optimizers", "model"],
)
def test_anything_but_an_optimizer_is_refused(optimizer, received):
    message = (
        r"`optimizer` must be an instance of `torch\.optim\.Optimizer`, made with the parameters to optimize\. Received"
    )
    with pytest.raises(TypeError, match=rf"(?s){message}.*{re.escape(received)}$"):
        Lookahead(optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adadelta"])
def test_differentiable_inner_optimizer_is_refused(name):
    message = (
        rf"must not be differentiable, as the slow step.*Received: optimizer={name}\(\.\.\., differentiable=True\)"
    )
    with pytest.raises(ValueError, match=message):
        Lookahead(getattr(torch.optim, name)(parameters((1,)), differentiable=True))


@bad_settings
def test_bad_argument_is_refused_and_the_inner_optimizer_left_as_it_was(name, value, error, message):
    inner = torch.optim.SGD(parameters((1,)))
    before, defaults = comparable(inner.param_groups), dict(inner.defaults)
    with pytest.raises(error, match=message):
        Lookahead(inner, **{name: value})
    assert comparable(inner.param_groups) == before
    assert inner.defaults == defaults


@bad_settings
def test_bad_setting_in_a_group_is_refused_and_the_inner_optimizer_left_as_it_was(name, value, error, message):
    first, second = parameters((1,), (1,))
    inner = torch.optim.SGD([{"params": [first]}, {"params": [second], name: value}])
    with pytest.raises(error, match=message):
        Lookahead(inner)
    assert set(inner.param_groups[0]) == set(inner.param_groups[1]) - {name}


def test_bad_setting_of_an_outer_wrapper_in_a_group_is_refused():
    (weight,) = parameters((1,))
    inner = Lookahead(torch.optim.SGD([{"params": [weight], "sync_period_2": -1}]))
    with pytest.raises(ValueError, match="Received: sync_period=-1"):
        Lookahead(inner)
    assert "slow_step_size_2" not in inner.param_groups[0]


def test_numpy_scalars_are_numbers_and_kept_as_those_of_python():
    optimizer = Lookahead(torch.optim.SGD(parameters((1,))), np.int64(5), np.float32(0.5))
    (group,) = optimizer.param_groups
    assert (group["sync_period"], group["slow_step_size"]) == (5, 0.5)
    assert (type(group["sync_period"]), type(group["slow_step_size"])) == (int, float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 5}, "Write `sync_period` for `k`.*Received: k=5"),
        ({"la_steps": 5, "la_alpha": 0.5}, "`sync_period` for `la_steps` and `slow_step_size` for `la_alpha`"),
        ({"alpha": 0.5}, "Write `slow_step_size` for `alpha`"),
        (
            {"sync_interval": 30, "outer_lr": 0.7, "outer_momentum": 0.6},
            "`sync_period` for `sync_interval` and `slow_step_size` for `outer_lr` and `slow_momentum` for `outer_mom",
        ),
        ({"momentum_outer": 0.9}, r"Write `slow_momentum` for `momentum_outer`.*Received: momentum_outer=0\.9"),
        ({"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
    ],
)
def test_an_argument_by_the_name_of_another_implementation_is_told_the_name_here(given, message):
    with pytest.raises(TypeError, match=message):
        Lookahead(torch.optim.SGD(parameters((2,)), 0.1), **given)


def test_the_inner_optimizer_by_another_name_is_told_the_name_here():
    with pytest.raises(TypeError, match="Write `optimizer` for `base_optimizer`"):
        Lookahead(base_optimizer=torch.optim.SGD(parameters((2,)), 0.1))


def test_a_slow_step_size_above_1_is_warned_of_by_the_constructor_and_for_new_groups():
    first, second, third = parameters((2,), (2,), (2,))
    with pytest.warns(UserWarning, match="over-relaxation.*Received: slow_step_size=1.5"):
        optimizer = Lookahead(torch.optim.SGD([{"params": first, "slow_step_size": 1.5}], 0.1))
    optimizer.add_param_group({"params": second, "slow_step_size": 1.0})
    with pytest.warns(UserWarning, match="Received: slow_step_size=2.5"):
        optimizer.add_param_group({"params": third, "slow_step_size": 2.5})


def test_a_second_wrapper_of_an_optimizer_is_warned_of_while_the_first_one_is_there():
    inner = torch.optim.SGD(parameters((2,)), 0.1)
    first = Lookahead(inner)
    with pytest.warns(UserWarning, match="Another `Lookahead` is around this optimizer already.*SGD"):
        Lookahead(inner)
    Lookahead(first)
    del first
    # The second wrapper is gone too.
    Lookahead(inner)


def test_a_sync_in_the_first_cycle_is_warned_of():
    weights = parameters((2,), (2,))
    optimizer = Lookahead(torch.optim.SGD([{"params": weights[0], "sync_period": 2}, {"params": weights[1]}], 0.1), 4)
    # Nothing was trained yet.
    optimizer.sync()
    for step in range(3):
        set_gradients(weights, step)
        optimizer.step()
    with pytest.warns(UserWarning, match="first cycle takes back 0.5 .*after 3 update.*sync_period=4") as caught:
        optimizer.sync()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    set_gradients(weights, 3)
    optimizer.step()
    optimizer.sync()


def test_defaults_are_those_of_tensorflow_addons():
    (group,) = Lookahead(torch.optim.SGD(parameters((1,)))).param_groups
    assert (group["sync_period"], group["slow_step_size"]) == (6, 0.5)


@bad_settings
def test_added_group_with_a_bad_setting_is_refused_and_changes_nothing(name, value, error, message):
    trained = Trained()
    group = {"params": parameters((2,)), name: value}
    with pytest.raises(error, match=message):
        trained.optimizer.add_param_group(group)
    assert set(group) == {"params", name}
    trained.assert_unchanged_and_able_to_train()


@pytest.mark.parametrize("name", ["sync_period", "sync_period_2"])
def test_group_added_to_a_nested_wrapper_with_a_bad_setting_of_either_changes_nothing(name):
    trained = Trained(nested=True)
    with pytest.raises(ValueError, match="Received: sync_period=-1"):
        trained.optimizer.add_param_group({"params": parameters((2,)), name: -1})
    trained.assert_unchanged_and_able_to_train()


def test_added_group_that_the_inner_optimizer_refuses_changes_nothing_and_gets_its_error():
    trained = Trained()
    for group, error, message in [
        ({"params": trained.fast[:1]}, ValueError, "some parameters appear in more than one parameter group"),
        ({"params": ["weight"]}, TypeError, "optimizer can only optimize Tensors"),
        ([trained.fast[0]], TypeError, "param_group must be a dict"),
    ]:
        with pytest.raises(error, match=message):
            trained.optimizer.add_param_group(group)
    trained.assert_unchanged_and_able_to_train()


def without_a_group(state_dict):
    del state_dict["param_groups"][1]


def with_another_group(state_dict):
    state_dict["param_groups"].append({**state_dict["param_groups"][0], "params": []})


def with_another_parameter(state_dict):
    state_dict["param_groups"][1]["params"].append(3)


def with_parameters_in_other_groups(state_dict):
    first, second = state_dict["param_groups"]
    first["params"], second["params"] = [0], [1, 2]


def with_a_slow_weight_turned(state_dict):
    state_dict["state"][1]["slow"] = state_dict["state"][1]["slow"].T


def with_a_smaller_last_slow_weight(state_dict):
    state_dict["state"][2]["slow"] = torch.zeros(2)


def with_no_tensor(state_dict):
    state_dict["state"][1]["slow"] = "slow"


def with_a_bad_setting(name, value):
    def change(state_dict):
        state_dict["param_groups"][1][name] = value

    return change


FITTING = r"`state_dict` must have the optimizer's groups, with \[2, 1\] parameters\. Received: groups with "
BAD_STATE_DICTS = [
    pytest.param(without_a_group, ValueError, FITTING + r"\[2\] parameters", id="without_a_group"),
    pytest.param(with_another_group, ValueError, FITTING + r"\[2, 1, 0\] parameters", id="another_group"),
    pytest.param(with_another_parameter, ValueError, FITTING + r"\[2, 2\] parameters", id="another_parameter"),
    pytest.param(with_parameters_in_other_groups, ValueError, FITTING + r"\[1, 2\] parameters", id="other_groups"),
    pytest.param(
        with_a_slow_weight_turned,
        ValueError,
        r"must have a slow weight of shape \(2, 3\) for parameter 1\. Received: shape \(3, 2\)",
        id="slow_weight_turned",
    ),
    pytest.param(
        with_a_smaller_last_slow_weight,
        ValueError,
        r"must have a slow weight of shape \(3,\) for parameter 2\. Received: shape \(2,\)",
        id="smaller_slow_weight",
    ),
    pytest.param(with_no_tensor, ValueError, r"for parameter 1\. Received: 'slow'", id="no_tensor"),
    *(
        pytest.param(with_a_bad_setting(name, value), error, message, id=f"{name}={value}")
        for name, value, error, message in BAD_SETTINGS
    ),
    *(
        pytest.param(
            with_a_bad_setting("lookahead_step", value),
            ValueError,
            rf"`lookahead_step` must be an integer >= 0, .*Received: {value!r}",
            id=f"lookahead_step={value}",
        )
        for value in ("x", None, NAN, -4, 2.5)
    ),
]


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_STATE_DICTS)
def test_state_dict_that_does_not_fit_is_refused_and_changes_nothing(change, error, message, nested):
    trained = Trained(nested)
    state_dict = copy.deepcopy(trained.optimizer.state_dict())
    change(state_dict)
    for one in state_dict["state"].values():
        one["exp_avg"].fill_(7.0)
    received = comparable(state_dict)
    with pytest.raises(error, match=message):
        trained.optimizer.load_state_dict(state_dict)
    assert repr(comparable(state_dict)) == repr(received)
    trained.assert_unchanged_and_able_to_train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slow_2", torch.zeros(3, 2), r"slow weight of shape \(2, 3\) for parameter 1\. Received: shape \(3, 2\)"),
        ("sync_period_2", -1, r"Received: sync_period=-1"),
    ],
)
def test_state_dict_that_does_not_fit_the_outer_wrapper_changes_nothing(name, value, message):
    trained = Trained(nested=True)
    state_dict = copy.deepcopy(trained.optimizer.state_dict())
    (state_dict["state"][1] if name == "slow_2" else state_dict["param_groups"][1])[name] = value
    with pytest.raises(ValueError, match=message):
        trained.optimizer.load_state_dict(state_dict)
    trained.assert_unchanged_and_able_to_train()


CALLS = {
    "step()": lambda optimizer: optimizer.step(),
    "sync()": lambda optimizer: optimizer.sync(),
    "reset_slow_weights()": lambda optimizer: optimizer.reset_slow_weights(),
    "load_state_dict(state_dict)": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_training_in_a_slow_weights_block_is_refused_and_changes_nothing(name):
    trained = Trained()
    message = re.escape(f"`{name}` was called inside a `slow_weights()` block: what it changes would be lost")
    with trained.optimizer.slow_weights():
        inside = trained.everything()
        with pytest.raises(RuntimeError, match=message):
            CALLS[name](trained.optimizer)
        assert trained.everything() == inside
        assert_same_bits(trained.fast, trained.hand.slow)
    trained.assert_unchanged_and_able_to_train()


@calls
def test_error_for_training_that_leaves_the_block_brings_the_fast_weights_back(name):
    trained = Trained()
    with pytest.raises(RuntimeError, match="Call it after the block"), trained.optimizer.slow_weights():
        CALLS[name](trained.optimizer)
    trained.assert_unchanged_and_able_to_train()


@calls
def test_training_in_a_block_inside_a_block_is_refused(name):
    trained = Trained()
    with trained.optimizer.slow_weights(), trained.optimizer.slow_weights():
        pass
    with trained.optimizer.slow_weights():
        with trained.optimizer.slow_weights():
            pass
        with pytest.raises(RuntimeError, match=r"inside a `slow_weights\(\)` block"):
            CALLS[name](trained.optimizer)
    trained.assert_unchanged_and_able_to_train()


@calls
def test_training_of_a_nested_wrapper_in_a_block_of_the_inner_one_is_refused_and_changes_nothing(name):
    trained = Trained(nested=True)
    with trained.optimizer.inner_optimizer.slow_weights():
        inside = trained.everything()
        with pytest.raises(RuntimeError, match=r"inside a `slow_weights\(\)` block"):
            CALLS[name](trained.optimizer)
        assert trained.everything() == inside
    trained.assert_unchanged_and_able_to_train()


def no_loss(*_):
    raise ArithmeticError("no loss")


def test_step_whose_closure_fails_does_not_count():
    trained = Trained()
    with pytest.raises(ArithmeticError, match="no loss"):
        trained.optimizer.step(no_loss)
    trained.assert_unchanged_and_able_to_train()


def test_step_in_which_the_inner_optimizer_fails_does_not_count():
    trained = Trained()
    handle = trained.optimizer.inner_optimizer.register_step_pre_hook(no_loss)
    with pytest.raises(ArithmeticError, match="no loss"):
        trained.optimizer.step()
    handle.remove()
    trained.assert_unchanged_and_able_to_train()


def test_capture_in_a_cuda_graph_is_refused_and_changes_nothing(monkeypatch):
    trained = Trained()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*Capture forward and backward"):
            trained.optimizer.step()
    trained.assert_unchanged_and_able_to_train()


def test_lookahead_inside_a_wrapper_of_another_kind_is_refused():
    class Wrapper(torch.optim.SGD):
        pass

    wrapper = Wrapper(parameters((3,)), lr=0.1)
    wrapper.optimizer = Lookahead(torch.optim.SGD(wrapper.param_groups, lr=0.1))
    with pytest.raises(ValueError, match=r"must not have a `Lookahead` inside.*Received: optimizer=Wrapper\(\.\.\.\)"):
        Lookahead(wrapper)


OTHERS = {
    "SGD": lambda one: torch.optim.SGD(one, 0.2, momentum=0.9),
    "Adam": lambda one: torch.optim.Adam(one, 0.2),
    "RMSprop": lambda one: torch.optim.RMSprop(one, 0.2),
}


@pytest.mark.parametrize("loads", OTHERS)
@pytest.mark.parametrize("wrote", OTHERS)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_checkpoint_of_another_inner_optimizer_is_refused_by_name_and_changes_nothing(loads, wrote, levels):
    def trained(name, levels, steps=4):
        weights = parameters((4,), (2, 3))
        optimizer = OTHERS[name](weights)
        for _ in range(levels):
            optimizer = Lookahead(optimizer, 3, 0.25)
        for step in range(steps):
            set_gradients(weights, step)
            optimizer.step()
        return weights, optimizer

    weights, optimizer = trained(loads, max(levels, 1))
    state_dict = copy.deepcopy(trained(wrote, levels)[1].state_dict())
    if loads == wrote:
        optimizer.load_state_dict(state_dict)
        return
    before = comparable([weights, optimizer.state_dict(), optimizer.param_groups])
    message = rf"`state_dict` must come from a `Lookahead` around a {loads}, or from that optimizer alone.*Received"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert comparable([weights, optimizer.state_dict(), optimizer.param_groups]) == before
    expected, reference = trained(loads, max(levels, 1))
    for step in range(4, 8):
        for one, other in ((weights, optimizer), (expected, reference)):
            set_gradients(one, step)
            other.step()
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("count", [2**63, -3, 2.7, True, "x", None, NAN, torch.tensor([1, 2])])
@pytest.mark.parametrize("how", ["by_hand", "loaded"])
def test_bad_count_is_refused_before_anything_changes(count, how):
    trained = Trained()
    if how == "loaded":
        state_dict = copy.deepcopy(trained.optimizer.state_dict())
        state_dict["param_groups"][0].update(lookahead_step=count, lr=0.7)
        with pytest.raises(ValueError, match=r"`lookahead_step` must be an integer >= 0.*Received"):
            trained.optimizer.load_state_dict(state_dict)
    else:
        kept = trained.optimizer.param_groups[0]["lookahead_step"]
        trained.optimizer.param_groups[0]["lookahead_step"] = count
        set_gradients(trained.fast, 6)
        before = comparable(trained.fast)
        with pytest.raises(ValueError, match=r"`lookahead_step` must be an integer >= 0.*Received"):
            trained.optimizer.step()
        assert comparable(trained.fast) == before
        trained.optimizer.param_groups[0]["lookahead_step"] = kept
    trained.assert_unchanged_and_able_to_train()


def test_a_hook_that_fails_after_the_inner_wrapper_has_loaded_changes_nothing():
    trained = Trained(nested=True)
    saved = copy.deepcopy(trained.optimizer.state_dict())
    trained.train(4)
    trained.before = trained.everything()

    def fail(optimizer):
        raise LookupError("no")

    handle = trained.optimizer.inner_optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(ValueError, match="LookupError: no"):
        trained.optimizer.load_state_dict(saved)
    handle.remove()
    assert trained.everything() == trained.before
    trained.train(7)


def test_a_group_without_a_count_and_with_a_bad_setting_is_still_new_when_that_is_mended():
    (weight,) = parameters((3,))
    optimizer = Lookahead(torch.optim.SGD([weight], 0.1), 100)
    weight.grad = torch.ones(3)
    optimizer.step()
    (group,) = optimizer.param_groups
    del group["lookahead_step"]
    group["sync_period"] = "2"
    with pytest.raises(TypeError, match="`sync_period` must be an integer"):
        optimizer.step()
    group["sync_period"] = 100
    expected = weight.detach().clone()
    optimizer.step()
    assert group["lookahead_step"] == 1
    assert_same_bits([optimizer.state[weight]["slow"]], [expected])
