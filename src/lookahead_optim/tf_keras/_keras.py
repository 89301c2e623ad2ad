"""The Keras 2 of this TensorFlow: `tf.keras` up to TensorFlow 2.15, the package `tf_keras` from 2.16 on."""

from typing import Any

import tensorflow as tf

__all__ = ["keras"]

keras: Any
if tuple(int(number) for number in tf.__version__.split(".")[:2]) < (2, 16):
    keras = tf.keras
else:
    import tf_keras

    keras = tf_keras
