"""A small character language model in JAX: a transformer of two layers, its loss, and pieces of text."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from source_text import CHARACTERS

CONTEXT, WIDTH, HEADS = 64, 64, 4


class Block(nn.Module):
    """A layer of a decoder-only transformer, with normalisation first."""

    @nn.compact
    def __call__(self, x):
        """Return an array like `x`, of shape (batch, length, channels)."""
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.relu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """The character model."""

    @nn.compact
    def __call__(self, text):
        """Return logits of shape (batch, length, characters) for integers of shape (batch, length)."""
        position = self.param("position", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x = nn.Embed(len(CHARACTERS), WIDTH)(text) + position
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(len(CHARACTERS))(nn.LayerNorm()(x))


@jax.jit
def initial_params(seed):
    """Return the parameters of a new model."""
    return Transformer().init(jax.random.key(seed), jnp.zeros((1, CONTEXT), int))


def starts_of_pieces(text, shape, seed):
    """Return where random pieces of a text start, as integers of a shape."""
    return np.random.default_rng(seed).integers(len(text) - CONTEXT, size=shape)


def loss_of(params, text, starts):
    """Return the mean cross-entropy of the pieces of a text that begin at `starts`, in nats a character."""
    pieces = text[starts[:, None] + jnp.arange(CONTEXT + 1)]
    logits = Transformer().apply(params, pieces[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:]).mean()
