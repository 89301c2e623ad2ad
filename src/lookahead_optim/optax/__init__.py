"""Lookahead for Optax: an ordinary gradient transformation."""

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.optax", "optax", "optax", "jax"):
    from lookahead_optim.optax._momentum import SlowMomentumState
    from lookahead_optim.optax._slow_weights import LookaheadState
    from lookahead_optim.optax.between_updates import reset_slow_params, slow_params, sync
    from lookahead_optim.optax.transformation import LookaheadTransformation, lookahead

__all__ = [
    "LookaheadState",
    "LookaheadTransformation",
    "SlowMomentumState",
    "lookahead",
    "reset_slow_params",
    "slow_params",
    "sync",
]
