"""Lookahead for Keras 2: `tf_keras`, or `tf.keras` of TensorFlow 2.15 and older."""

from lookahead_optim.tf_keras.callbacks import SwapSlowWeights
from lookahead_optim.tf_keras.optimizer import Lookahead

__all__ = ["Lookahead", "SwapSlowWeights"]
