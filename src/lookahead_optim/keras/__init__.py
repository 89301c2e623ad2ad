"""Lookahead for Keras 3, on its TensorFlow, JAX and PyTorch backends."""

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.keras", "keras", "keras"):
    from lookahead_optim.keras.callbacks import SwapSlowWeights
    from lookahead_optim.keras.optimizer import Lookahead
    from lookahead_optim.keras.rectified_adam import RectifiedAdam

__all__ = ["Lookahead", "RectifiedAdam", "SwapSlowWeights"]
