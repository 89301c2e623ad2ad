"""Lookahead for Optax: an ordinary gradient transformation."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lookahead_optim._checks import check_slow_step_size, check_sync_period

__all__ = ["LookaheadState", "LookaheadTransformation", "lookahead", "reset_slow_params", "slow_params", "sync"]


class LookaheadState(NamedTuple):
    """State of the transformation that `lookahead` returns. Read the slow parameters with `slow_params`.

    Attributes:
        inner_state: State of the inner transformation.
        slow_params: Tree like the parameters, with their shapes, dtypes and shardings: the slow parameters where
            `captured` is 1. `None` if Lookahead is switched off.
        step: int32 scalar, the number of updates of the inner transformation.
        captured: int32 scalar. 0 before the first update and right after a sync: the slow parameters are the parameters
            themselves then, and `slow_params` is set to them at the next update. Otherwise 1. (Not a boolean, as some
            wrappers do arithmetic on states.)
        slow_step_size: float scalar, the slow step size of the next sync.
    """

    inner_state: optax.OptState
    slow_params: optax.Params
    step: jax.Array
    captured: jax.Array
    slow_step_size: jax.Array


class LookaheadTransformation(optax.GradientTransformationExtraArgs):
    """The `optax.GradientTransformationExtraArgs` that `lookahead` returns, with one function more."""

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        r"""Make a step, and return the new parameters instead of updates to be added.

        The same as `update` and `optax.apply_updates`, but that a sync is exact: the new parameters are the rounded
        $\phi + \alpha (\theta - \phi)$, which no update added to $\theta$ gives in general.

        Args:
            grads: Tree of gradients, as for `update`.
            state: State of this transformation. It can be donated, like the parameters.
            params: Tree of parameters.
            **extra_args: What the inner transformation's `update` takes besides.

        Returns:
            New parameters, with the shapes and dtypes of `params`, and the new state. A jitted function should return
            them in the order in which it takes those that it donates, as XLA reuses buffers by position.
        """
        return self.update.__self__.apply_gradients(grads, state, params, **extra_args)


def lookahead(
    inner: optax.GradientTransformation,
    sync_period: jax.typing.ArrayLike = 6,
    slow_step_size: jax.typing.ArrayLike | optax.Schedule = 0.5,
) -> LookaheadTransformation:
    r"""Lookahead: `k` steps forward, one step back.

    The inner transformation moves the parameters, the *fast* ones $\theta$. After every `sync_period` ($k$) of its
    updates a second copy of them, the *slow* parameters $\phi$, takes a step towards the fast ones, and these restart
    from there:

    $$\phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi.$$

    Parameters and updates are plain trees; the slow parameters live in the state. They are captured immediately before
    the first update and take the memory of one more copy of the parameters. `slow_params` finds them in the state of
    any optimizer that this transformation is a part of. After a sync they are the parameters that the updates result
    in, bit for bit, also if something behind it in an `optax.chain` has changed these updates.

    What counts is an update that is applied. Gradients that `optax.MultiSteps` inside only accumulates, those that
    `optax.apply_if_finite` inside finds not to be finite, and the adversarial steps of `optax.contrib.sam` do not.

    A `lookahead` may be inside another. Both count the updates of the innermost transformation, and all parameters
    restart from those that the outer one has synchronised, the inner one's slow ones too.

    Args:
        inner: The inner transformation, or an `optax.MultiSteps`. What changes its updates belongs inside:
            `lookahead(optax.chain(...))`.
        sync_period: Integer >= 0, inner updates per slow step ($k$). 0 switches Lookahead off: the transformation then
            is the inner one. An array may be traced, and its value is not checked. Defaults to 6.
        slow_step_size: Finite float >= 0, the slow step size ($\alpha$), or an Optax schedule of the number of syncs
            so far, `step // sync_period`. 1 recovers the inner transformation. An array may be traced, and its value
            is not checked. Defaults to 0.5.

    Returns:
        An `optax.GradientTransformationExtraArgs` that has `apply_gradients` too.

    Raises:
        TypeError: if `inner`, `sync_period` or `slow_step_size` has the wrong type.
        ValueError: if a number is out of range, or, from an update, if it is not given parameters like those of `init`.

    Example:

    >>> import jax, jax.numpy as jnp, optax
    >>> from lookahead_optim.optax import lookahead, slow_params
    >>> optimizer = lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
    >>> params = {"w": jnp.ones(2)}
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = jax.grad(lambda params: params["w"].sum())(params)
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> [f"{params['w'][0]:.2f}", f"{slow_params(state, params)['w'][0]:.2f}"]
    ['0.45', '0.75']

    References:
        Zhang, Lucas, Hinton and Ba, [Lookahead Optimizer: k steps forward, 1 step
        back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1.
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be an `optax.GradientTransformation`, such as `optax.adam(1e-3)`, or an `optax.MultiSteps`. "
            f"Received: inner={inner!r} of type {type(inner).__name__}"
        )
    if _is_array(sync_period):
        _check_scalar("sync_period", sync_period, jnp.integer, "an integer")
    else:
        sync_period = check_sync_period(sync_period)
    if _is_array(slow_step_size):
        _check_scalar("slow_step_size", slow_step_size, jnp.floating, "a floating-point")
    elif not callable(slow_step_size):
        slow_step_size = check_slow_step_size(slow_step_size)
    rule = _Lookahead(optax.with_extra_args_support(inner), sync_period, slow_step_size)
    return LookaheadTransformation(rule.init, rule.update)


def slow_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Return the slow parameters, to evaluate with.

    Args:
        state: The state of an optimizer that has a `lookahead` at any depth: of `optax.chain`, `masked`, `partition`,
            `inject_hyperparams`, `MultiSteps`, `apply_if_finite`; the `opt_state` of a Flax `nnx.Optimizer`, or a whole
            `TrainState`. Of a `lookahead` inside another, those of the outer one are returned.
        params: Tree of the current parameters, as the optimizer gets them.

    Returns:
        A tree like `params`, in new buffers. A parameter that no `lookahead` in `state` has, as it is masked out, is
        that of `params`.

    Raises:
        ValueError: if `state` has no `lookahead`, or one of other parameters.
    """

    def slow(state: LookaheadState, slow: Any, param: Any) -> Any:
        return jnp.where(_scalar(state.captured) != 0, slow, param)

    return _map_slow(slow, state, params)


def sync(state: optax.OptState, params: optax.Params) -> tuple[optax.Params, optax.OptState]:
    """Synchronise now, for the end of a run that does not end on a sync. A second call changes nothing.

    Args:
        state: As for `slow_params`.
        params: Tree of the current parameters.

    Returns:
        The new parameters and the new state.

    Raises:
        ValueError: as `slow_params`.
    """

    def synchronized(state: LookaheadState, slow: Any, param: Any) -> Any:
        moved = _interpolate(slow, param, _scalar(state.slow_step_size))
        return jnp.where(_scalar(state.captured) != 0, moved, param)

    return _map_slow(synchronized, state, params), _restart(state, True)


def reset_slow_params(state: optax.OptState, params: optax.Params) -> optax.OptState:
    """Capture the slow parameters again, after restoring the best ones, say.

    Args:
        state: As for `slow_params`.
        params: Tree of the parameters to capture.

    Returns:
        The new state, with a copy of the parameters.

    Raises:
        ValueError: as `slow_params`.
    """
    _map_slow(lambda state, slow, param: None, state, params)
    leaves = _by_path(params)

    def reset(node: Any) -> Any:
        if not isinstance(node, LookaheadState):
            return node
        return node._replace(
            inner_state=_map_nodes(reset, node.inner_state),
            slow_params=jax.tree_util.tree_map_with_path(lambda path, _: jnp.copy(leaves[path]), node.slow_params),
            captured=jax.tree.map(jnp.ones_like, node.captured),
        )

    return _map_nodes(reset, state)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lookahead:
    """The functions of the transformation, with its settings.

    A sync only changes the parameters; the slow ones are read from them at the next update. That makes it
    elementwise, so that XLA fuses it into the inner transformation's last operation and needs no buffer for it, and
    whatever the caller's addition rounds the updates to, fast and slow parameters are the same afterwards.
    """

    inner: optax.GradientTransformationExtraArgs
    sync_period: Any
    slow_step_size: Any

    def init(self, params: optax.Params) -> LookaheadState:
        step = jnp.zeros((), jnp.int32)
        return LookaheadState(
            inner_state=self.inner.init(params),
            # A copy, as a buffer cannot be donated twice.
            slow_params=None if self._is_off() else jax.tree.map(jnp.copy, params),
            step=step,
            captured=jnp.zeros((), jnp.int32),
            slow_step_size=jnp.asarray(self._slow_step_size_at(step), float),
        )

    def update(
        self, updates: optax.Updates, state: LookaheadState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LookaheadState]:
        updates, is_sync, new_state = self._advance(updates, state, params, extra_args)
        slow_step_size = self._slow_step_size_at(state.step)
        if self._is_off() or (isinstance(slow_step_size, float) and slow_step_size == 1):
            return updates, new_state

        def update(slow: Any, param: Any, update: Any) -> Any:
            if not _is_weight(param):
                return update
            param, update = jnp.asarray(param), jnp.asarray(update)
            dtype = jnp.promote_types(param.dtype, update.dtype)
            fast = _apply(param, update)
            target = _interpolate(slow, fast, slow_step_size)
            to_target = (target.astype(dtype) - param.astype(dtype)).astype(update.dtype)
            # The same update for a step size of 1, with a derivative by it.
            unchanged = update - ((1 - slow_step_size) * _finite(fast - slow)).astype(update.dtype)
            return jnp.where(is_sync, jnp.where(slow_step_size == 1, unchanged, to_target), update)

        return jax.tree.map(update, new_state.slow_params, params, updates), new_state

    def apply_gradients(
        self, grads: optax.Updates, state: LookaheadState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, LookaheadState]:
        updates, is_sync, new_state = self._advance(grads, state, params, extra_args)
        if self._is_off():
            return optax.apply_updates(params, updates), new_state
        slow_step_size = self._slow_step_size_at(state.step)

        def apply(slow: Any, param: Any, update: Any) -> Any:
            fast = _apply(param, update)
            return jnp.where(is_sync, _interpolate(slow, fast, slow_step_size), fast) if _is_weight(param) else fast

        return jax.tree.map(apply, new_state.slow_params, params, updates), new_state

    def _advance(
        self, updates: optax.Updates, state: LookaheadState, params: optax.Params | None, extra_args: dict[str, Any]
    ) -> tuple[optax.Updates, Any, LookaheadState]:
        """Return the inner updates, whether they end a cycle, and the new state."""
        if params is None:
            raise ValueError(
                "`params` must be given to the update of a `lookahead`, which moves them: "
                "`update(updates, state, params)`. Received: params=None"
            )
        slow = state.slow_params
        if not self._is_off():
            _check_like(slow, params)
            # In this order: with `_capture` where the predicate is false, XLA copies all slow parameters at every step.
            slow = jax.lax.cond(state.captured == 0, _capture, _keep, slow, params)
        updates, inner_state = self.inner.update(updates, state.inner_state, params, **extra_args)
        is_applied, is_counted = _progress(state.inner_state, inner_state)
        step = jnp.where(is_counted, optax.safe_increment(state.step), state.step)
        is_sync = is_counted & (step % self._cycle() == 0) & (self.sync_period > 0)
        new_state = LookaheadState(
            inner_state=_restart(inner_state, is_sync),
            slow_params=slow,
            step=step,
            captured=jnp.where(is_applied, 1 - (is_sync | (self.sync_period == 0)), state.captured).astype(jnp.int32),
            slow_step_size=jnp.asarray(self._slow_step_size_at(step), float),
        )
        return updates, is_sync, new_state

    def _is_off(self) -> bool:
        return not _is_array(self.sync_period) and self.sync_period == 0

    def _cycle(self) -> Any:
        return jnp.maximum(self.sync_period, 1)

    def _slow_step_size_at(self, step: jax.Array) -> Any:
        return self.slow_step_size(step // self._cycle()) if callable(self.slow_step_size) else self.slow_step_size


# Branches of a conditional: as functions of the module they are traced and compiled once outside of `jit` too.
def _keep(slow: Any, params: Any) -> Any:
    return slow


def _capture(slow: Any, params: Any) -> Any:
    return jax.tree.map(lambda slow, param: jnp.asarray(param, slow.dtype), slow, params)


def _apply(param: Any, update: Any) -> jax.Array:
    return jnp.asarray(param + update).astype(jnp.result_type(param))


def _interpolate(slow: Any, fast: jax.Array, slow_step_size: Any) -> jax.Array:
    """Return slow + slow_step_size (fast - slow), in at least single precision, rounded once."""
    if not _is_weight(fast):
        return fast
    dtype = jnp.promote_types(fast.dtype, jnp.float32)
    wide_slow, wide_fast = jnp.asarray(slow, dtype), fast.astype(dtype)
    moved = wide_slow + slow_step_size * (wide_fast - wide_slow)
    # That is not exactly `fast` for a step size of 1; this is, with the same derivative by it.
    back = wide_fast - (1 - slow_step_size) * _finite(wide_fast - wide_slow)
    return jnp.where(slow_step_size == 1, back, moved).astype(fast.dtype)


def _finite(difference: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(difference), difference, 0)


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def _check_scalar(name: str, value: Any, kind: type, article: str) -> None:
    if not jnp.issubdtype(value.dtype, kind) or value.ndim:
        raise TypeError(
            f"`{name}` must be {article} scalar if it is an array. "
            f"Received: an array of dtype {value.dtype} and shape {value.shape}"
        )


def _check_like(slow: Any, params: Any) -> None:
    expected, received = _shapes(slow), _shapes(params)
    if expected != received:
        raise ValueError(
            "`params` must be like those that the state was initialised with, which have the paths and shapes "
            f"{expected!r:.500}. Received: {received!r:.500}"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in _by_path(tree).items()}


def _is_weight(param: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(param), jnp.inexact)


def _nodes(tree: Any, kinds: tuple[type, ...]) -> Iterator[Any]:
    """Yield the outermost nodes of a tree that are of certain types."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return (leaf for leaf in leaves if isinstance(leaf, kinds))


_LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


def _map_nodes(function: Callable[[Any], Any], tree: Any) -> Any:
    """Map the outermost nodes of interest of a tree, and other leaves."""
    kinds = (LookaheadState, *_LINE_SEARCHES)
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, kinds))


def _progress(before: optax.OptState, after: optax.OptState) -> tuple[Any, Any]:
    """Return whether the updates between two states move the parameters, and whether they complete a step."""
    is_applied, is_counted = jnp.array(True), jnp.array(True)
    kinds = (optax.MultiStepsState, optax.ApplyIfFiniteState, optax.contrib.SAMState)
    for old, new in zip(_nodes(before, kinds), _nodes(after, kinds)):
        if isinstance(new, optax.MultiStepsState):
            is_applied &= new.gradient_step != old.gradient_step
        elif isinstance(new, optax.ApplyIfFiniteState):
            is_applied &= new.last_finite
        else:
            is_counted &= new.steps_since_sync == 0
        applied, counted = _progress(tuple(old), tuple(new))
        is_applied, is_counted = is_applied & applied, is_counted & counted
    return is_applied, is_applied & is_counted


def _restart(state: optax.OptState, is_sync: Any) -> optax.OptState:
    """Return a state that fits parameters which a sync has moved."""

    def restart(node: Any) -> Any:
        if isinstance(node, LookaheadState):
            captured = jax.tree.map(lambda captured: jnp.where(is_sync, 0, captured), node.captured)
            return node._replace(inner_state=_restart(node.inner_state, is_sync), captured=captured)
        if isinstance(node, _LINE_SEARCHES):
            # For `optax.value_and_grad_from_state`: value and gradient are those of other parameters.
            return node._replace(value=jax.tree.map(lambda value: jnp.where(is_sync, jnp.inf, value), node.value))
        return node

    return _map_nodes(restart, state)


def _scalar(node: Any) -> Any:
    """Return the one leaf of a node, as `nnx` keeps scalars in variables."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def _by_path(tree: Any) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _map_slow(function: Callable[[LookaheadState, Any, Any], Any], state: optax.OptState, params: Any) -> Any:
    """Map a function of state, slow parameter and parameter over the parameters that a `lookahead` has."""
    found = list(_nodes(state, (LookaheadState,)))
    if not found:
        raise ValueError(
            "`state` must be the state of an optimizer that has a `lookahead_optim.optax.lookahead`. "
            f"Received: state={state!r:.500}"
        )
    leaves = _by_path(params)
    mapped = {path: jnp.copy(param) if _is_array(param) else param for path, param in leaves.items()}
    for one in found:
        # By path: where parameters are masked out there are none in the state, and those of `nnx` are variables there.
        for path, slow in _by_path(one.slow_params).items():
            if path not in leaves or jnp.shape(leaves[path]) != jnp.shape(slow):
                raise ValueError(
                    "`params` must be those that the `lookahead` in `state` gets; it has a slow one of shape "
                    f"{jnp.shape(slow)} at {jax.tree_util.keystr(path) or 'the root'}. Received: parameters of shapes "
                    f"{_shapes(params)!r:.500}"
                )
            if _is_weight(leaves[path]):
                mapped[path] = function(one, slow, leaves[path])
    return jax.tree.unflatten(jax.tree.structure(params), [mapped[path] for path in leaves])
