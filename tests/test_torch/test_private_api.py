"""Private parts of PyTorch that the front ends use: a release that changes a part is named here."""

import inspect
import operator

import pytest
import torch

USED = {
    # Hooks have public functions to register them, but none to run them.
    "torch.optim.Optimizer.__init__": (
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
    ),
    # Only the optimizer's constructor and `__setstate__` wrap `step`, and only by this method.
    "torch.optim.Optimizer.__setstate__": ("_patch_step_function",),
}
EXISTING = [
    # The `foreach` operations that `torch.optim` is made of have no public names.
    "_foreach_copy_",
    "_foreach_lerp_",
    # No public operation tells of a list of weights whether all are finite.
    "_amp_foreach_non_finite_check_and_unscale_",
    # No public function returns the store of the processes.
    "distributed.distributed_c10d._get_default_store",
]


def message(name):
    return f"PyTorch {torch.__version__} has no `{name}` any more, which `lookahead_optim.torch` uses."


@pytest.mark.parametrize("name", EXISTING)
def test_what_is_used_of_pytorch_is_there(name):
    try:
        operator.attrgetter(name)(torch)
    except AttributeError:
        pytest.fail(message(f"torch.{name}"))


@pytest.mark.parametrize("method", USED)
def test_what_an_optimizer_is_made_with_has_the_names_that_are_used(method):
    function = operator.attrgetter(method.removeprefix("torch."))(torch)
    attributes = set(vars(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])))
    for name in USED[method]:
        assert name in attributes or name in inspect.getsource(function), message(f"{name} in {method}")


def test_weights_in_a_list_are_seen_not_to_be_finite():
    found = torch.zeros(())
    weights = [torch.ones(2), torch.tensor([1.0, torch.inf])]
    torch._amp_foreach_non_finite_check_and_unscale_(weights, found, torch.ones(()))
    assert found, f"PyTorch {torch.__version__} finds no infinity by `_amp_foreach_non_finite_check_and_unscale_`."
    assert torch.equal(weights[0], torch.ones(2))
