"""Checkpoints with flipped bits or cut off: an error, no loss, or a documented limit of the format."""

import collections
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from lookahead_optim.optax import lookahead
from tests.child_processes import finish, start
from tests.damage import check
from tests.test_optax.by_hand import make_grads, make_params
from tests.test_optax.whole_steps import whole_step

COUNT = 400


def make_saved():
    optimizer = lookahead(optax.adam(0.1), 4)
    params, state = make_params(), optimizer.init(make_params())
    for number in range(6):
        params, state = whole_step(optimizer)(params, state, make_grads(number, params))
    return {"params": params, "state": state}


@pytest.fixture(scope="module")
def saved():
    return make_saved()


def is_same(one, other):
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    bits = [[(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in some] for some in leaves]
    return bits[0] == bits[1] and jax.tree.structure(one) == jax.tree.structure(other)


def outcomes(data, load, saved, count=COUNT):
    """Loading returns a new state, so an error changes nothing."""
    loaded = {}
    return check(data, count, lambda data: loaded.update(load(data)), lambda: True, lambda: is_same(loaded, saved))


def test_a_damaged_npz_file_is_an_error_or_unharmed(saved):
    file, leaves = io.BytesIO(), jax.tree.leaves(saved)
    np.savez(file, *leaves)

    def load(data):
        with np.load(io.BytesIO(data)) as loaded:
            return jax.tree.unflatten(jax.tree.structure(saved), [loaded[f"arr_{one}"] for one in range(len(leaves))])

    found = outcomes(file.getvalue(), load, saved)
    assert found["cut", "error"] == COUNT // 4
    assert found["flip", "changed"] == 0


def test_damaged_msgpack_is_an_error_if_it_is_cut_off_but_has_no_checksum(saved):
    like = jax.tree.map(jnp.zeros_like, saved)
    found = outcomes(serialization.to_bytes(saved), lambda data: serialization.from_bytes(like, data), saved)
    assert found["cut", "error"] == COUNT // 4
    # The limit that the docs name.
    assert found["flip", "changed"] > 0


def test_a_damaged_orbax_checkpoint_is_an_error_or_unharmed(tmp_path):
    # In its own process: if a read fails, Orbax does not finish other reads that it has begun.
    finish(start(sys.modules[__name__], tmp_path), timeout=300)


def damage_orbax(directory):
    saved, found = make_saved(), collections.Counter()
    like, path = jax.tree.map(jnp.zeros_like, saved), Path(directory) / "saved"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        for file in sorted(one for one in path.rglob("*") if one.is_file() and one.stat().st_size):
            data = file.read_bytes()

            def load(data, file=file):
                file.write_bytes(data)
                return checkpointer.restore(path, like)

            found += outcomes(data, load, saved, count=16)
            file.write_bytes(data)
    assert found["cut", "error"] > 0
    assert found["flip", "error"] > 0
    assert found["cut", "changed"] == found["flip", "changed"] == 0


if __name__ == "__main__":
    damage_orbax(*sys.argv[1:])
