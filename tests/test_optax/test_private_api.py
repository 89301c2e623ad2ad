"""Parts of Optax and JAX that the package needs and that their documentation does not promise.

A failure here says what a new version changed, and where.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import lookahead_optim.optax

PACKAGE = Path(lookahead_optim.optax.__file__).parent

# What `_combinators.py` reads.
FIELDS = [
    (optax.MultiStepsState, "gradient_step"),
    (optax.MultiStepsState, "mini_step"),
    (optax.ApplyIfFiniteState, "last_finite"),
    (optax.contrib.SAMState, "steps_since_sync"),
    (optax.ScaleByBacktrackingLinesearchState, "value"),
    (optax.ScaleByZoomLinesearchState, "value"),
]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field}" for kind, field in FIELDS])
def test_a_state_has_the_field(kind, field):
    assert field in kind.__annotations__, (
        f"Optax {optax.__version__}: `{kind.__name__}` has no `{field}`; see `_combinators.py`"
    )


def test_a_transformation_is_made_of_init_and_update():
    fields = optax.GradientTransformationExtraArgs._fields
    assert fields == ("init", "update"), (
        f"Optax {optax.__version__}: `GradientTransformationExtraArgs` has the fields {fields}; see `apply_gradients`"
    )


def test_a_line_search_computes_anew_where_the_value_it_keeps_is_infinite():
    values = []

    def value(params):
        values.append(params)
        return jnp.sum(params**2)

    state = optax.ScaleByBacktrackingLinesearchState(1.0, jnp.array(jnp.inf), jnp.zeros(2), None)
    _, grad = optax.value_and_grad_from_state(value)(jnp.ones(2), state=state)
    assert (grad == 2).all(), (
        f"Optax {optax.__version__}: `value_and_grad_from_state` takes an infinite value for one that was computed; "
        "see `restarted_line_searches`"
    )


def test_is_leaf_is_asked_for_none_and_for_the_root():
    asked = []
    jax.tree.leaves((None, 1), is_leaf=lambda node: asked.append(node))
    assert asked == [(None, 1), None, 1], (
        f"JAX {jax.__version__}: `is_leaf` is asked for {asked}; see `children` in `_trees.py`"
    )


def test_no_private_name_of_jax_or_optax_is_used():
    for path in sorted(PACKAGE.rglob("*.py")):
        found = re.findall(r"\b(?:jax|jnp|optax)(?:\.\w+)*\._\w+|\b(?:jax|optax)\._src\b", path.read_text())
        found = [name for name in found if not name.startswith("optax._") or "_src" in name]
        assert not found, f"{path.name} uses {found}"
