"""The arithmetic of the backend that Keras runs on."""

import keras

if keras.config.backend() == "tensorflow":
    from lookahead_optim.keras._tensorflow import capture, check_scope, copy_of, gradients, increment, synchronize
elif keras.config.backend() == "jax":
    from lookahead_optim.keras._jax import capture, check_scope, copy_of, gradients, increment, synchronize
elif keras.config.backend() == "torch":
    from lookahead_optim.keras._torch import capture, check_scope, copy_of, gradients, increment, synchronize
else:
    raise ImportError(
        "`lookahead_optim.keras` trains on the tensorflow, jax and torch backends of Keras. "
        f"Received: KERAS_BACKEND={keras.config.backend()}"
    )

__all__ = ["capture", "check_scope", "copy_of", "gradients", "increment", "synchronize"]
