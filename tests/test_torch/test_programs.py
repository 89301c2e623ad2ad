"""What real programs do with an optimizer's state, groups and methods: the same works as with the bare optimizer."""

import collections
import copy
import gc
import json
import threading
import weakref

import pytest
import torch

from lookahead_optim.torch import Lookahead
from tests.comparison import assert_same_bits
from tests.test_torch.by_hand import ByHand, parameters, set_gradients


def adam(weights):
    return torch.optim.Adam(weights, 0.05)


def train(optimizer, weights, steps):
    for step in steps:
        set_gradients(weights, step)
        optimizer.step()


def twins(inner=adam, sync_period=3):
    """Return weights and the optimizer of two equal runs. The second run is made by hand."""
    fast, expected = (parameters((4,), (2, 3)) for _ in range(2))
    return fast, Lookahead(inner(fast), sync_period, 0.25), expected, ByHand(inner(expected), sync_period, 0.25)


def zeroed_in_place(optimizer):
    for entries in optimizer.state.values():
        for value in entries.values():
            if torch.is_tensor(value):
                value.zero_()


def zeroed_by_name(optimizer):
    for group in optimizer.param_groups:
        for one in group["params"]:
            for name in optimizer.state[one]:
                optimizer.state[one][name].zero_()


@pytest.mark.parametrize("zero", [zeroed_in_place, zeroed_by_name])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_moments_zeroed_in_place_leave_the_slow_weights_alone(zero, at):
    fast, optimizer, expected, hand = twins()
    train(optimizer, fast, range(at))
    train(hand, expected, range(at))
    zero(optimizer)
    zero(hand.optimizer)
    train(optimizer, fast, range(at, 9))
    train(hand, expected, range(at, 9))
    assert_same_bits(fast, expected)


@pytest.mark.parametrize("change", ["more", "fewer", "permuted"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_rows_added_removed_and_permuted_as_in_gaussian_splatting(change, at):
    def changed(rows, value):
        if change == "more":
            return torch.cat([rows, value.expand(2, rows.shape[1])])
        return rows[1:] if change == "fewer" else rows.flip(0)

    def change_rows(optimizer):
        group = optimizer.param_groups[0]
        old = group["params"][1]
        entries = optimizer.state.get(old)
        new = torch.nn.Parameter(changed(old.detach(), torch.ones(1)))
        for name, value in entries.items():
            if torch.is_tensor(value) and value.dim():
                entries[name] = changed(value, torch.zeros(1))
        del optimizer.state[old]
        group["params"][1] = new
        optimizer.state[new] = entries
        return new

    fast, optimizer, expected, hand = twins()
    train(optimizer, fast, range(at))
    train(hand, expected, range(at))
    fast[1] = change_rows(optimizer)
    expected[1] = hand.parameters[1] = change_rows(hand.optimizer)
    # A new parameter's slow weight starts from its own value, and so do all its rows.
    hand.slow[1] = expected[1].detach().clone()
    train(optimizer, fast, range(at, 9))
    train(hand, expected, range(at, 9))
    assert_same_bits(fast, expected)


def test_entries_and_state_are_dictionaries_and_all_that_reads_them_sees_their_content():
    fast, optimizer, _, _ = twins()
    train(optimizer, fast, range(2))
    state, entries = optimizer.state, optimizer.state[fast[0]]
    names = ["step", "exp_avg", "exp_avg_sq", "slow"]
    assert isinstance(state, dict)
    assert isinstance(entries, dict)
    assert list(entries) == list({**entries}) == list(dict(entries)) == list(copy.copy(entries)) == names
    assert list(reversed(entries)) == names[::-1]
    assert list(entries | {"more": 1}) == [*names, "more"]
    assert list({"more": 1} | entries) == ["more", *names]
    assert list(entries.copy()) == names
    assert type(entries.copy()) is dict
    assert len(entries) == 4
    assert "'slow': tensor" in repr(entries)
    entries |= {"step": torch.tensor(7.0)}
    assert float(optimizer.inner_optimizer.state[fast[0]]["step"]) == 7
    assert json.dumps(optimizer.state.setdefault("extra", {"a": 1})) == '{"a": 1}'
    assert list({**state}) == [*fast, "extra"]
    assert [type(one) for one in copy.copy(state).values()] == [dict] * 3


def test_the_helper_that_moves_a_state_to_a_device_moves_all_of_it():
    (one,) = parameters((3,))
    optimizer = Lookahead(adam([one]), 3)
    train(optimizer, [one], range(1))
    one.data, one.grad = one.data.double(), None
    for entries in optimizer.state.values():
        assert isinstance(entries, dict)
        for value in entries.values():
            value.data = value.data.double()
    assert {value.dtype for value in optimizer.state[one].values()} == {torch.float64}


class Counting(torch.optim.SGD):
    """Keeps a number in the state that belongs to no parameter, as MADGRAD does."""

    def step(self, closure=None):
        self.state["calls"] = self.state.get("calls", torch.tensor(0)) + 1
        return super().step(closure)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_state_of_no_parameter_is_read_written_saved_and_copied(levels):
    def make():
        optimizer = Counting(parameters((3,)), 0.1)
        optimizer.state["calls"] = torch.tensor(0)
        for _ in range(levels):
            optimizer = Lookahead(optimizer)
        return optimizer

    optimizer = make()
    for _ in range(3):
        optimizer.step()
    assert int(optimizer.state["calls"]) == int(optimizer.state.get("calls")) == 3
    loaded = make()
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, loaded, copy.deepcopy(optimizer)):
        one.step()
        assert int(one.state["calls"]) == 4
    optimizer.state["calls"] = 8
    assert optimizer.inner_optimizer.state["calls"] == 8
    assert optimizer.state.pop("calls") == 8
    assert "calls" not in optimizer.state


@pytest.mark.parametrize("save", [lambda state: state, copy.copy], ids=["itself", "copy"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_state_can_be_kept_while_another_one_is_used_and_put_back(save, levels):
    fast, expected = parameters((4,)), parameters((4,))
    optimizer, reference = (torch.optim.SGD(one, 0.1, momentum=0.9) for one in (fast, expected))
    for _ in range(levels):
        optimizer, reference = Lookahead(optimizer, 3), Lookahead(reference, 3)
    train(optimizer, fast, range(2))
    train(reference, expected, range(2))
    assert optimizer.state is optimizer.state
    saved, values = save(optimizer.state), fast[0].detach().clone()
    counts = [dict(group) for group in optimizer.param_groups]
    optimizer.state = collections.defaultdict(dict)
    train(optimizer, fast, range(50, 54))
    optimizer.state = saved
    optimizer.param_groups[0].update(counts[0])
    fast[0].data.copy_(values)
    train(optimizer, fast, range(2, 9))
    train(reference, expected, range(2, 9))
    assert_same_bits(fast, expected)


def test_setstate_sets_state_groups_and_defaults():
    fast, optimizer, expected, hand = twins()
    train(optimizer, fast, range(4))
    train(hand, expected, range(4))
    optimizer.__setstate__({"state": collections.defaultdict(dict), "defaults": {**hand.optimizer.defaults, "lr": 1.0}})
    assert len(optimizer.state) == len(optimizer.inner_optimizer.state) == 0
    defaults = optimizer.inner_optimizer.defaults
    assert [defaults[name] for name in ("lr", "sync_period", "slow_step_size")] == [1.0, 3, 0.25]
    hand.optimizer.state.clear()
    hand.slow = [one.detach().clone() for one in expected]
    train(optimizer, fast, range(4, 9))
    train(hand, expected, range(4, 9))
    assert_same_bits(fast, expected)
    group = {**optimizer.param_groups[0], "lr": 0.5}
    optimizer.__setstate__({"param_groups": [group]})
    assert optimizer.inner_optimizer.param_groups[0] is group


@pytest.mark.parametrize("levels", [1, 2])
def test_groups_are_plain_data(levels):
    optimizer = torch.optim.Adam(parameters((3,)))
    for _ in range(levels):
        optimizer = Lookahead(optimizer)
    optimizer.step()
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    assert json.loads(json.dumps(settings)) == {**settings, "betas": [0.9, 0.999]}
    assert [type(settings["lookahead_step"]), settings["lookahead_step"]] == [int, 1]


@pytest.mark.parametrize(
    "inner", ["Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "SGD"]
)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_training_goes_on_without_lookahead_from_its_checkpoint(inner, steps):
    def make():
        weights = parameters((3,), (2,), (2, 2))
        return weights, getattr(torch.optim, inner)(weights, lr=0.05)

    def with_gradients(weights, steps, optimizer):
        for step in steps:
            # The second weight never has a gradient, such as an unused head.
            set_gradients(weights, step)
            weights[1].grad = None
            optimizer.step()

    weights, optimizer = make()
    optimizer = Lookahead(optimizer, 3)
    with_gradients(weights, range(steps), optimizer)
    bare_weights, bare = make()
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = [torch.nn.Parameter(one.detach().clone()) for one in weights]
    reference = getattr(torch.optim, inner)(expected, lr=0.05)
    reference.load_state_dict(copy.deepcopy(optimizer.inner_optimizer.state_dict()))
    for one, other in zip(bare_weights, weights):
        one.data.copy_(other.detach())
    with_gradients(bare_weights, range(steps, 6), bare)
    with_gradients(expected, range(steps, 6), reference)
    assert_same_bits(bare_weights, expected)
    # With Lookahead too: a slow weight that the file leaves out is captured again where it was.
    resumed_weights, resumed = make()
    resumed = Lookahead(resumed, 3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(resumed_weights, weights):
        one.data.copy_(other.detach())
    with_gradients(resumed_weights, range(steps, 9), resumed)
    with_gradients(weights, range(steps, 9), optimizer)
    assert_same_bits(resumed_weights, weights)


class WithModes(torch.optim.SGD):
    """Must be told when training begins, like the optimizers of `schedulefree`."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)


@pytest.mark.parametrize("levels", [1, 2])
def test_other_methods_of_the_inner_optimizer_are_reached_and_mistakes_are_not_hidden(levels):
    inner = optimizer = WithModes(parameters((3,)), 0.1)
    for _ in range(levels):
        optimizer = Lookahead(optimizer)
    assert callable(optimizer.train)
    optimizer.train()
    assert inner.mode == optimizer.mode == "train"
    optimizer.step()
    for name in ("sync_period", "slow_step_size", "lookahead_step"):
        assert not hasattr(optimizer, name)
        with pytest.raises(AttributeError, match=rf"`{name}`.*setting of each group"):
            getattr(optimizer, name)
        with pytest.raises(AttributeError, match=rf"`{name}` is a setting of each group.*Received: {name}=3"):
            setattr(optimizer, name, 3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optimizer.nothing
    # A `GradScaler` asks for this attribute. It would set attributes on the wrapper that the inner optimizer does not
    # see.
    inner._step_supports_amp_scaling = True
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_a_scaler_scales_gradients_for_a_fused_inner_optimizer():
    fast, expected = parameters((4,)), parameters((4,))
    optimizer = Lookahead(torch.optim.SGD(fast, 0.1, fused=True), 3, 0.25)
    hand = ByHand(torch.optim.SGD(expected, 0.1), 3, 0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(7):
        set_gradients(expected, step)
        fast[0].grad = expected[0].grad * 4
        if step == 2:
            fast[0].grad = fast[0].grad * float("inf")
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update(4.0)
            continue
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(4.0)
        hand.step()
    assert optimizer.param_groups[0]["lookahead_step"] == 6
    assert_same_bits(fast, expected)


def test_blocks_in_one_thread_beside_steps_in_another_see_no_mixture_and_lose_no_step():
    weights = [torch.nn.Parameter(torch.ones(5_000, dtype=torch.float64)) for _ in range(8)]
    optimizer = Lookahead(torch.optim.SGD(weights, 0.125, foreach=False), 5, 0.5)
    for one in weights:
        one.grad = torch.ones_like(one)
    optimizer.step()
    done, stop, refused = [1], threading.Event(), set()

    def steps():
        while not stop.is_set() and done[0] < 20_000:
            try:
                optimizer.step()
                done[0] += 1
            except RuntimeError as error:
                refused.add(str(error).split(":")[0])

    thread = threading.Thread(target=steps)
    thread.start()
    seen = []
    for _ in range(100):
        with optimizer.slow_weights():
            seen.append({one[0].item() for one in weights} | {one[-1].item() for one in weights})
    stop.set()
    thread.join()
    assert all(len(values) == 1 for values in seen)
    assert refused <= {"`step()` was called inside a `slow_weights()` block"}
    cycles, rest = divmod(done[0], 5)
    expected = 1 - cycles * 5 * 0.125 / 2 - rest * 0.125
    assert {one[0].item() for one in weights} == {expected}


NEAR_THE_END = [
    # slow, fast, step size, result of the formula
    (-float("inf"), -float("inf"), 0.5, -float("inf")),
    (float("inf"), float("inf"), 0.3, float("inf")),
    (1.0, float("inf"), 0.5, float("inf")),
    (3e38, -3e38, 0.5, 0.0),
    (3e38, -3e38, 0.25, 1.5e38),
    (3e38, -3e38, 0.0, 3e38),
    (3e38, -3e38, 1.0, -3e38),
    (1.0, float("inf"), 0.0, 1.0),
]


@pytest.mark.parametrize(("slow", "fast", "step_size", "expected"), NEAR_THE_END)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sync_near_the_ends_of_numbers_is_the_formula(slow, fast, step_size, expected, dtype):
    weights = [torch.nn.Parameter(torch.tensor([slow, 1.0], dtype=dtype)) for _ in range(2)]
    optimizer = Lookahead(torch.optim.SGD(weights, 0.0), 2, step_size)
    for step in range(2):
        for one in weights:
            one.grad = torch.zeros_like(one)
            if step:
                one.data[0] = fast
        optimizer.step()
    for one in weights:
        torch.testing.assert_close(one[0].item(), expected, rtol=1e-2, atol=1e36)
        assert one[1] == 1
        assert_same_bits([optimizer.state[one]["slow"]], [one.detach()])


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_weights_that_become_infinite_in_training_stay_so(value):
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 2, 0.5)
    for step in range(9):
        one.grad = torch.zeros(4)
        optimizer.step()
        if step == 2:
            one.data[1] = value
    assert one[1] == value
    assert one.isfinite().sum() == 3


@pytest.mark.filterwarnings("ignore:`slow_step_size` above 1")
def test_a_large_step_size_that_is_no_number_of_the_dtype_is_the_formula_and_not_an_error():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 1.0), 2, 1e39)
    for gradient in (1.0, 1.0, 0.0):
        one.grad = torch.full((4,), gradient)
        optimizer.step()
    assert one.tolist() == [-float("inf")] * 4
    assert optimizer.param_groups[0]["lookahead_step"] == 3


def test_a_block_puts_back_parameters_without_a_slow_weight_too():
    weights = parameters((4,), (3,), (2,))
    weights[1].requires_grad_(False)
    groups = [{"params": weights[:2]}, {"params": weights[2:], "sync_period": 0}]
    optimizer = Lookahead(torch.optim.SGD(groups, 0.1), 3)
    for steps in range(2):
        before = [one.detach().clone() for one in weights]
        with optimizer.slow_weights(), torch.no_grad():
            for one in weights:
                one.fill_(9)
        assert_same_bits(weights, before)
        train(optimizer, [weights[0], weights[2]], range(steps, steps + 1))


@pytest.mark.parametrize("action", ["block", "load"])
def test_a_block_or_a_load_between_two_moves_of_dtype_does_not_round_the_slow_weights(action):
    module, expected = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected.load_state_dict(module.state_dict())
    optimizer = Lookahead(torch.optim.SGD(module.parameters(), 0.1), 3, 0.25)
    hand = ByHand(torch.optim.SGD(expected.parameters(), 0.1), 3, 0.25)
    train(optimizer, list(module.parameters()), range(2))
    train(hand, list(expected.parameters()), range(2))
    values = copy.deepcopy(module.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    module.to(torch.bfloat16)
    if action == "block":
        with optimizer.slow_weights():
            for one, slow in zip(module.parameters(), hand.slow):
                assert_same_bits([one], [slow.to(torch.bfloat16)])
    else:
        optimizer.load_state_dict(saved)
    module.to(torch.float32)
    module.load_state_dict(values)
    train(optimizer, list(module.parameters()), range(2, 9))
    train(hand, list(expected.parameters()), range(2, 9))
    assert_same_bits(module.parameters(), expected.parameters())


def test_an_optimizer_that_is_deleted_goes_at_once():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 3)
    train(optimizer, [one], range(4))
    assert len(optimizer.state) == 1
    held = [weakref.ref(optimizer), weakref.ref(one)]
    gc.collect()
    gc.disable()
    try:
        del optimizer, one
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("kinds", [("outer", "inner"), ("inner", "outer"), ("outer", "outer")])
def test_blocks_that_overlap_in_any_order_bring_the_fast_weights_back(kinds, first_out):
    (one,) = parameters((4,))
    inner = Lookahead(torch.optim.SGD([one], 0.1), 2)
    outer = Lookahead(inner, 4)
    train(outer, [one], range(3))
    fast = one.detach().clone()
    blocks = [{"outer": outer, "inner": inner}[kind].slow_weights() for kind in kinds]
    for block in blocks:
        block.__enter__()
    blocks[first_out].__exit__(None, None, None)
    assert not torch.equal(one, fast)
    with pytest.raises(RuntimeError, match="inside a `slow_weights"):
        outer.step()
    blocks[1 - first_out].__exit__(None, None, None)
    assert_same_bits([one], [fast])
    outer.step()


def test_a_look_at_the_state_makes_no_entry_of_the_inner_optimizer():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 3)
    train(optimizer, [one], range(1))
    assert [list(entries) for entries in optimizer.state.values()] == [["slow"]]
    entries = optimizer.state[one]
    assert one not in optimizer.inner_optimizer.state
    entries["more"] = 1
    assert optimizer.inner_optimizer.state[one] == {"more": 1}
    assert list(entries) == list(optimizer.state[one]) == ["more", "slow"]


def test_entries_may_be_changed_after_they_were_put_under_another_parameter():
    weights = parameters((2,), (3,))
    optimizer = Lookahead(torch.optim.SGD(weights, 0.1, momentum=0.9), 3)
    train(optimizer, weights, range(2))
    entries, new = optimizer.state[weights[0]], torch.nn.Parameter(torch.ones(4))
    del optimizer.state[weights[0]]
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = entries
    entries["momentum_buffer"] = torch.zeros(4)
    train(optimizer, [new, weights[1]], range(2, 3))
    assert_same_bits([optimizer.state[new]["momentum_buffer"]], [new.grad])


def test_a_slow_weight_that_is_assigned_from_its_parameter_is_a_copy():
    (one,) = parameters((4,))
    optimizer = Lookahead(torch.optim.SGD([one], 0.1), 3)
    train(optimizer, [one], range(2))
    expected = one.detach().clone()
    optimizer.state[one]["slow"] = one.data
    one.data.add_(1)
    assert_same_bits([optimizer.state[one]["slow"]], [expected])


def test_an_attribute_of_the_inner_optimizer_is_set_there():
    optimizer = Lookahead(WithModes(parameters((3,)), 0.1))
    optimizer.mode = "train"
    assert optimizer.inner_optimizer.mode == "train"
    optimizer.note = 1
    assert not hasattr(optimizer.inner_optimizer, "note")


class WithOwnStep(Lookahead):
    """A subclass of a user that does something more in each step."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("copied", [False, True], ids=["made", "copied"])
@pytest.mark.parametrize("wrapper", [Lookahead, WithOwnStep])
def test_each_hook_runs_once_in_a_step_of_a_subclass_too(wrapper, copied):
    from torch.optim import optimizer as hooks

    weights = parameters((3,))
    optimizer = wrapper(adam(weights), 2)
    if copied:
        optimizer = copy.deepcopy(optimizer)
    calls = []
    handles = [
        register(lambda *args, name=name: calls.append(name))
        for name, register in {
            "global pre": hooks.register_optimizer_step_pre_hook,
            "global post": hooks.register_optimizer_step_post_hook,
            "own pre": optimizer.register_step_pre_hook,
            "own post": optimizer.register_step_post_hook,
        }.items()
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["own pre", "global pre", "global post", "own post"]
