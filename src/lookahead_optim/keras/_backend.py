"""The arithmetic of the backend that Keras runs on."""

import keras

if keras.config.backend() == "tensorflow":
    from lookahead_optim.keras._tensorflow import (
        Tracked,
        after,
        capture,
        check_scope,
        copy_of,
        gradients,
        mark_captured,
        read,
        synchronize,
    )
elif keras.config.backend() == "jax":
    from lookahead_optim.keras._jax import (  # type: ignore[assignment]
        Tracked,
        after,
        capture,
        check_scope,
        copy_of,
        gradients,
        mark_captured,
        read,
        synchronize,
    )
elif keras.config.backend() == "torch":
    from lookahead_optim.keras._torch import (  # type: ignore[assignment]
        Tracked,
        after,
        capture,
        check_scope,
        copy_of,
        gradients,
        mark_captured,
        read,
        synchronize,
    )
else:
    raise ImportError(
        "`lookahead_optim.keras` trains on the tensorflow, jax and torch backends of Keras. "
        f"Received: KERAS_BACKEND={keras.config.backend()}"
    )

__all__ = [
    "Tracked",
    "after",
    "capture",
    "check_scope",
    "copy_of",
    "gradients",
    "mark_captured",
    "read",
    "synchronize",
]
