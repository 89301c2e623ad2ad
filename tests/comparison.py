"""Comparison bit for bit of arrays of any framework."""

from collections.abc import Iterable

import numpy as np


def _bits(array):
    """Return dtype, shape and bytes of an array, a variable or a tensor."""
    if hasattr(array, "detach"):
        import torch

        # NumPy lacks some dtypes of PyTorch.
        dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
        return dtype, shape, array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def _assert_same_array(actual, expected):
    assert _bits(actual) == _bits(expected), f"{actual} and {expected} differ"


def _for_each_pair(function, actual, expected):
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            _for_each_pair(function, actual[key], expected[key])
    elif isinstance(actual, Iterable) and not hasattr(actual, "dtype") and not isinstance(actual, str):
        for one, other in zip(actual, expected, strict=True):
            _for_each_pair(function, one, other)
    else:
        function(actual, expected)


def assert_same_bits(actual, expected, for_each_pair=_for_each_pair):
    """Check that arrays are equal bit for bit, and in dtype and shape: NaN equals NaN, 0 does not equal -0.

    Args:
        actual, expected: Arrays, variables or tensors, in lists and dictionaries.
        for_each_pair: Calls a function with the arrays of both; for trees of JAX this is `jax.tree.map`.
    """
    for_each_pair(_assert_same_array, actual, expected)
