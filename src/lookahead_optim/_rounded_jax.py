"""Rounding to a narrower dtype in programs of XLA."""

import jax
import jax.numpy as jnp

__all__ = ["rounded"]


def rounded(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return real numbers as a dtype of the same width or narrower has them, in their own dtype.

    XLA may leave out a conversion there and back, as its programs may be more precise than they say. This operation it
    keeps. It makes 0 of what is below the normal numbers of the narrower dtype, which are rounded by hand.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(value.dtype)
    if (narrow.nexp, narrow.nmant) == (wide.nexp, wide.nmant):
        return value
    result = jax.lax.reduce_precision(value, narrow.nexp, narrow.nmant)
    if narrow.nexp == wide.nexp:
        return result
    spacing = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(value) < float(narrow.tiny), jnp.round(value / spacing) * spacing, result)
