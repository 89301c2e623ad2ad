"""Checkpoints with flipped bits or cut off: an error, no loss, or a documented limit. Loading runs no code."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lookahead_optim.torch import Lookahead
from tests.damage import check

COUNT = 400


def make(seed):
    """Return a model and its optimizer in mid-cycle."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=0.05), 4)
    for _ in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def flat(tree):
    """Return all keys, numbers and bits of a state dict."""
    if isinstance(tree, dict):
        return [one for key, value in tree.items() for one in (repr(key), *flat(value))]
    if isinstance(tree, (list, tuple)):
        return [one for value in tree for one in flat(value)]
    if isinstance(tree, torch.Tensor):
        return [(tree.dtype, tree.shape, tree.detach().numpy().tobytes())]
    return [repr(tree)]


def test_a_damaged_file_of_torch_save_is_an_error_that_changes_nothing_or_loads_as_a_whole():
    (_, saved), (_, optimizer) = make(0), make(1)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    before, state = flat(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())

    def load(data):
        optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))

    found = check(
        file.getvalue(),
        COUNT,
        load,
        lambda: flat(optimizer.state_dict()) == before,
        lambda: flat(optimizer.state_dict()) == flat(saved.state_dict()),
    )
    assert found["cut", "error"] == COUNT // 4
    # The limit that the docs name: no checksum is compared.
    assert found["flip", "changed"] > 0
    assert found["flip", "error"] > found["flip", "changed"]


def states(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_distributed_checkpoint_is_an_error_if_it_is_cut_off(tmp_path, name):
    """The checkpoint is loaded in place.

    So after an error it must be loaded again as a whole, and then it is as saved.
    """
    saved, (model, optimizer) = make(0), make(1)
    dcp.save(states(*saved), checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / name

    def load(data):
        path.write_bytes(data)
        loaded = states(model, optimizer)
        try:
            dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
        except CheckpointException as error:  # no `Exception`
            raise ValueError from error
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])

    def is_as_saved():
        return flat(optimizer.state_dict()) == flat(saved[1].state_dict())

    data = path.read_bytes()
    found = check(data, 60, load, lambda: True, is_as_saved)
    assert found["cut", "error"] == 60 // 4
    load(data)
    assert is_as_saved()


class Call:
    """When it is unpickled, it makes a call that makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_only_loads_a_state_dict_and_refuses_a_pickled_call(tmp_path):
    (_, saved), (_, optimizer) = make(0), make(1)
    state = saved.state_dict()
    torch.save(state, tmp_path / "good.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "good.pt", weights_only=True))
    assert flat(optimizer.state_dict()) == flat(saved.state_dict())

    state["param_groups"][0]["sync_period"] = Call(tmp_path / "made")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
    assert not (tmp_path / "made").exists()
