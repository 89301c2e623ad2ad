"""Shapes of weights, and statistics of times."""

import math

from timing import quartiles

MIB, GIB = 2**20, 2**30


def transformer(width, size, element_size=4):
    """Return shapes of a transformer's layers, one layer after the other, of about `size` bytes in all."""
    layer = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    layer += [(width, 4 * width), *[(width,)] * 5]
    bytes_of_layer = element_size * sum(map(math.prod, layer))
    return layer * max(1, round(size / bytes_of_layer))


def count(shapes):
    """Return the number of elements in all shapes."""
    return sum(map(math.prod, shapes))


def summary(values):
    """Return the median and the quartiles, rounded to five digits."""
    low, median, high = quartiles(values)
    return {
        "median": float(f"{median:.5g}"),
        "quartiles": [float(f"{low:.5g}"), float(f"{high:.5g}")],
        "n": len(values),
    }
