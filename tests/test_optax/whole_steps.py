"""A step of training from gradients to new parameters in one function, in each of the two forms."""

import jax
import numpy as np
import optax

FORMS = ["update", "apply_gradients"]


def whole_step(optimizer, form="update"):
    """Return a function of parameters, state and gradients that returns new parameters and state."""

    def step(params, state, grads):
        if form == "apply_gradients":
            return optimizer.apply_gradients(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def snapshot(tree):
    """Return the tree with copies of its leaves in NumPy arrays."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)
