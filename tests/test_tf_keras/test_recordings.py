"""`Lookahead` does what `tfa.optimizers.Lookahead` did, step by step, and reads the files that it wrote.

`record_original.py` made the recordings, and describes their format.
"""

import json

import numpy as np
import pytest

from tests.test_tf_keras.recorded import (
    RECORDINGS,
    WAYS,
    check_training_goes_on,
    check_training_starts_anew,
    check_trajectory,
)

INDEX = json.loads((RECORDINGS / "index.json").read_text())
TRAJECTORIES = np.load(RECORDINGS / "trajectories.npz")
TRAJECTORY_OF = {entry["name"]: entry for entry in INDEX["trajectories"]}
IN_GRAPHS = [name for name in TRAJECTORY_OF if name.endswith(("-k5-a0.5", "-sparse"))]
RUNS = [(name, False) for name in TRAJECTORY_OF] + [(name, True) for name in IN_GRAPHS]


@pytest.mark.parametrize(("name", "graph"), RUNS)
def test_trajectory_is_the_originals(name, graph):
    entry = TRAJECTORY_OF[name]
    # The original's own eager and graph runs differ by up to 8 units for sparse gradients. In float16 its slow step
    # rounds three times, this package's slow step rounds once.
    units = 16 if (entry["sparse"] and graph) or entry["dtype"] == "float16" else 4
    check_trajectory(entry, TRAJECTORIES, units, graph)


LOADED = [(name, *way) for name, entry in INDEX["models"].items() for way in WAYS if way[0] in entry["files"]]


@pytest.mark.parametrize(("name", "kind", "load"), LOADED, ids=lambda one: getattr(one, "__name__", one))
def test_training_goes_on_where_the_original_left_off(name, kind, load):
    check_training_goes_on(RECORDINGS / name, INDEX["models"][name], kind, load)


def test_files_without_the_optimizers_state_begin_a_new_cycle_as_with_the_original():
    check_training_starts_anew(RECORDINGS / "adam", INDEX["models"]["adam"])
