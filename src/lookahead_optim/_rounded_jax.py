"""Rounding to a narrower dtype in programs of XLA."""

import jax
import jax.numpy as jnp

__all__ = ["rounded"]


def rounded(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return real numbers rounded to a dtype of the same width or narrower, in their own dtype.

    XLA may leave out a conversion to a dtype and back, as XLA may compute more precisely than the program says. XLA
    keeps this operation. But the operation makes numbers 0 that are below the normal numbers of the narrower dtype.
    Such numbers are rounded by hand.

    Args:
        value: Array of real numbers.
        dtype: The dtype to whose numbers the array is rounded.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(value.dtype)
    if (narrow.nexp, narrow.nmant) == (wide.nexp, wide.nmant):
        return value
    result = jax.lax.reduce_precision(value, narrow.nexp, narrow.nmant)
    if narrow.nexp == wide.nexp:
        return result
    spacing = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(value) < float(narrow.tiny), jnp.round(value / spacing) * spacing, result)
