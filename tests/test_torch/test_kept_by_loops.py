"""Training loops of users, plain and with Accelerate: the file that a block saves is the model that was scored."""

import copy

import pytest
import torch

from tests.child_processes import finish, start
from tests.comparison import assert_same_bits
from tests.test_torch import loop_runs
from tests.test_torch.loop_runs import EPOCHS, INPUTS, LOOPS, PERIOD, STEPS, Plain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", LOOPS)
def test_the_best_file_is_the_model_that_was_scored_and_resumes_the_run(tmp_path, name):
    if name == "accelerate":
        pytest.importorskip("accelerate")
    run = LOOPS[name]()
    run.run(tmp_path)
    # Otherwise the best model would look like the last, or slow weights like fast weights.
    assert run.best_epoch + 1 < EPOCHS
    assert (run.best_epoch + 1) * STEPS % PERIOD
    (tmp_path / "resumed").mkdir()
    finish(start(loop_runs, name, tmp_path, run.best_epoch + 1), timeout=120)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found.pop("scores").values()) == {min(run.losses)}
    state = run.state()
    assert found.pop("losses") == state.pop("losses")[run.best_epoch + 1 :]
    assert_same_bits(found, {name: dict(one) for name, one in state.items()})


def test_what_stays_in_memory_has_slow_weights_if_it_is_a_copy():
    run = Plain()
    run.train_epoch()
    fast = copy.deepcopy(run.model.state_dict())
    with run.block():
        slow = {name: run.optimizer.state[one]["slow"] for name, one in run.model.named_parameters()}
        copies = copy.deepcopy(run.model).state_dict(), copy.deepcopy(run.model.state_dict())
        references = run.model.state_dict(), torch.export.export(run.model, (INPUTS,)).state_dict
    assert not any(torch.equal(one, slow[name]) for name, one in fast.items())
    for weights in copies:
        assert_same_bits(dict(weights), slow)
    for weights in references:
        assert_same_bits(dict(weights), dict(fast))
