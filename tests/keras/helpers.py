"""What the Keras tests share: small models and data, and comparison bit for bit."""

import keras
import numpy as np

BACKEND = keras.config.backend()


def data(rows=96, columns=4, seed=0):
    """Return float32 `x` of shape (rows, columns) and `y` of shape (rows, 1), a noisy linear task."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype("float32")
    y = x @ rng.normal(size=(columns, 1)) + 0.1 * rng.normal(size=(rows, 1))
    return x, y.astype("float32")


def mlp(columns=4, seed=0, **kwargs):
    """Return a built two-layer network with the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((columns,)), keras.layers.Dense(8, activation="tanh", **kwargs), keras.layers.Dense(1, **kwargs)]
    )


def values(variables):
    """Return copies of the variables' values as NumPy arrays."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_same_bits(actual, expected):
    """Check that two lists of variables or arrays are equal bit for bit."""
    actual, expected = values(actual), values(expected)
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected)):
        assert one.dtype == other.dtype, index
        assert one.tobytes() == other.tobytes(), f"array {index} differs: {one} and {other}"
