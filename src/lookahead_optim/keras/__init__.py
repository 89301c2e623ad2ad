"""Lookahead for Keras 3, on its TensorFlow, JAX and PyTorch backends."""

from lookahead_optim.keras.callbacks import SwapSlowWeights
from lookahead_optim.keras.optimizer import Lookahead

__all__ = ["Lookahead", "SwapSlowWeights"]
