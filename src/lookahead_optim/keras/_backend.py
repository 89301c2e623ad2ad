"""The module for the backend on which Keras runs: `_on_tensorflow.py`, `_on_jax.py` or `_on_torch.py`.

The arithmetic of `synchronize` is in `_outer_step_tensorflow.py`, `_outer_step_jax.py` and `_outer_step_torch.py`.
"""

import importlib

import keras

__all__ = ["backend"]

if keras.config.backend() not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        "`lookahead_optim.keras` trains on the tensorflow, jax and torch backends of Keras. "
        f"Received: KERAS_BACKEND={keras.config.backend()}"
    )

backend = importlib.import_module(f"lookahead_optim.keras._on_{keras.config.backend()}")
