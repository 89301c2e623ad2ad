"""What a `lookahead` must know about Optax' own transformations inside it. Their states say it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lookahead_optim.optax._count import END
from lookahead_optim.optax._trees import children, outermost_nodes

__all__ = ["completes_step", "is_applied", "restarted_line_searches"]

_LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


def is_applied(before: optax.OptState, after: optax.OptState) -> jax.Array:
    """Return whether the inner updates between two states move the parameters.

    All transformations move the parameters except two: `optax.MultiSteps` accumulates, and `optax.apply_if_finite`
    rejects. The updates that `optax.apply_if_finite` applies after too many errors in a row look like rejected updates.
    """
    answer = jnp.array(True)
    kinds = (optax.MultiStepsState, optax.ApplyIfFiniteState)
    for old, new in zip(_nodes(before, kinds), _nodes(after, kinds)):
        if isinstance(new, optax.MultiStepsState):
            # The count of steps stays at the end of int32. There only the end of an accumulation shows that an update
            # was applied.
            is_at_end = (old.gradient_step == END) & (new.mini_step == 0) & (old.mini_step != 0)
            answer &= (new.gradient_step != old.gradient_step) | is_at_end
        else:
            answer &= new.last_finite
    return answer


def completes_step(after: optax.OptState) -> jax.Array:
    """Return whether the inner update that made a state completes a step. Only adversarial steps of `sam` do not."""
    answer = jnp.array(True)
    for state in _nodes(after, (optax.contrib.SAMState,)):
        answer &= state.steps_since_sync == 0
    return answer


def restarted_line_searches(state: optax.OptState, is_moved_otherwise: ArrayLike) -> optax.OptState:
    """If `is_moved_otherwise`, return a state for parameters that something other than an update has moved.

    Line searches keep their last value for `optax.value_and_grad_from_state`. That function computes value and gradient
    again if the kept value is infinite.
    """

    def restart(node: Any) -> Any:
        if not isinstance(node, _LINE_SEARCHES):
            return node
        return node._replace(
            value=jax.tree.map(lambda value: jnp.where(is_moved_otherwise, jnp.inf, value), node.value)
        )

    return jax.tree.map(restart, state, is_leaf=lambda node: isinstance(node, _LINE_SEARCHES))


def _nodes(tree: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Yield the nodes of certain types, each before the nodes inside it."""
    for node in outermost_nodes(tree, kinds):
        yield node
        yield from _nodes(children(node), kinds)
