"""Lookahead for Keras 2: `tf_keras`, or `tf.keras` of TensorFlow 2.15 and older."""

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.tf_keras", "tf-keras", "tf_keras", "tensorflow"):
    from lookahead_optim.tf_keras.adamw import AdamW
    from lookahead_optim.tf_keras.callbacks import SwapSlowWeights
    from lookahead_optim.tf_keras.optimizer import Lookahead
    from lookahead_optim.tf_keras.rectified_adam import RectifiedAdam

__all__ = ["AdamW", "Lookahead", "RectifiedAdam", "SwapSlowWeights"]
