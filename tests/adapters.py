"""Adapters by which the front ends join the conformance suite.

Arrays are NumPy's, copied in and out. If `KERAS_BACKEND` is set, only the adapter of Keras 3 joins, as Keras has one
backend per process. Otherwise all other front ends that are installed join. They run on `DEVICE`. JAX and Keras use a
GPU if there is one.
"""

import copy
import importlib.metadata
import importlib.util
import os
import warnings
from typing import ClassVar

import numpy as np

from tests.device import DEVICE, ON_CPU

ADAPTERS = []


class Adapter:
    """A training run of a few weights with a front end: made by the constructor, `bare` or `nested`, innermost first.

    `oracle_settings` make the oracle's inner optimizers like the framework's. Where a sync is not `exact`, it ends one
    rounding beside the slow weights that it computes. Some inner optimizers take no missing gradients. What is here
    suits the optimizers of Keras. An adapter that `has_momentum` takes `slow_momentum` and `slow_nesterov`, too.
    """

    oracle_settings: ClassVar = {}
    exact = True
    has_momentum = False
    inner_without_missing_gradients: ClassVar = set()

    def __init__(self, weights, inner, settings, sync_period, slow_step_size, **outer):
        self._start(weights, inner, settings, [(sync_period, slow_step_size)], [outer])

    @classmethod
    def bare(cls, weights, inner, settings):
        return cls.nested(weights, inner, settings, [], [])

    @classmethod
    def nested(cls, weights, inner, settings, periods, slow_step_sizes, outer=({}, {})):
        run = cls.__new__(cls)
        run._start(weights, inner, settings, zip(periods, slow_step_sizes), outer)
        return run

    def _start(self, weights, inner, settings, wrappers, outer):
        self.set_weights(weights)
        self.optimizer = self.make_inner(inner, settings)
        for (period, step_size), more in zip(wrappers, outer):
            self.optimizer = self.lookahead(self.optimizer, period, step_size, **more)
        self.build()

    @staticmethod
    def without_gradient(gradient):
        """Return the value that stands for a missing gradient."""
        return

    def load_fast(self, weights):
        for variable, weight in zip(self.variables, weights):
            variable.assign(weight)

    def save(self):
        return self.fast(), self.optimizer.get_weights()

    def load(self, saved):
        self.load_fast(saved[0])
        self.optimizer.set_weights(saved[1])

    def sync(self):
        self.optimizer.sync()

    def reset_slow_weights(self):
        self.optimizer.reset_slow_weights()


def _joins(framework):
    return "KERAS_BACKEND" not in os.environ and importlib.util.find_spec(framework) is not None


if "KERAS_BACKEND" in os.environ:
    import keras

    import lookahead_optim.keras

    class Keras(Adapter):
        lookahead = lookahead_optim.keras.Lookahead
        has_momentum = True

        def set_weights(self, weights):
            self.variables = [keras.Variable(weight) for weight in weights]

        def make_inner(self, name, settings):
            return (keras.optimizers.Adam if name == "adam" else keras.optimizers.SGD)(**settings)

        def build(self):
            self.optimizer.build(self.variables)

        def apply(self, gradients):
            tensors = [None if one is None else keras.ops.convert_to_tensor(one) for one in gradients]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Gradients do not exist for variables")
                self.optimizer.apply(tensors, self.variables)

        def fast(self):
            return [np.array(keras.ops.convert_to_numpy(one.value)) for one in self.variables]

        def slow(self):
            return [np.array(keras.ops.convert_to_numpy(one.value)) for one in self.optimizer.slow_variables]

    ADAPTERS.append(Keras)

if _joins("torch"):
    import torch

    import lookahead_optim.torch

    class Torch(Adapter):
        oracle_settings: ClassVar = {"adam": {"pytorch": True}}
        lookahead = lookahead_optim.torch.Lookahead
        has_momentum = True
        implementation: ClassVar = {}

        def set_weights(self, weights):
            self.parameters = [torch.nn.Parameter(torch.tensor(weight, device=DEVICE)) for weight in weights]

        def make_inner(self, name, settings):
            names = {"learning_rate": "lr", "epsilon": "eps"}
            settings = {names.get(key, key): value for key, value in settings.items()} | self.implementation
            if name != "adam":
                settings.pop("capturable", None)
            return (torch.optim.Adam if name == "adam" else torch.optim.SGD)(self.parameters, **settings)

        def build(self):
            pass

        def apply(self, gradients):
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = None if gradient is None else torch.tensor(gradient, device=DEVICE)
            self.optimizer.step()

        def fast(self):
            return [parameter.detach().cpu().numpy().copy() for parameter in self.parameters]

        def slow(self):
            states = [self.optimizer.state[parameter] for parameter in self.parameters]
            # The value of the outermost wrapper.
            name = max(key for key in states[0] if key.startswith("slow") and "momentum" not in key)
            return [state[name].cpu().numpy().copy() for state in states]

        @torch.no_grad()
        def load_fast(self, weights):
            for parameter, weight in zip(self.parameters, weights):
                parameter.copy_(torch.tensor(weight))

        def save(self):
            return self.fast(), copy.deepcopy(self.optimizer.state_dict())

        def load(self, saved):
            self.load_fast(saved[0])
            self.optimizer.load_state_dict(saved[1])

    class TorchFused(Torch):
        implementation: ClassVar = {"fused": True}
        # PyTorch's own fused SGD fails where only some weights have a momentum already.
        inner_without_missing_gradients: ClassVar = {"momentum", "nesterov"}

    class TorchCapturable(Torch):
        implementation: ClassVar = {"foreach": True, "capturable": True}

    # On the CPU PyTorch has a loop over the weights. Other tests compare the other implementations with it.
    ADAPTERS += [Torch] if ON_CPU else [Torch, TorchFused, TorchCapturable]

if _joins("optax"):
    import jax
    import jax.numpy as jnp
    import optax

    import lookahead_optim.optax

    class Optax(Adapter):
        oracle_settings: ClassVar = {"adam": {"pytorch": True}}
        exact = False
        has_momentum = True
        lookahead = staticmethod(lookahead_optim.optax.lookahead)

        @staticmethod
        def without_gradient(gradient):
            return np.zeros_like(gradient)

        def set_weights(self, weights):
            self.params = [jnp.array(weight) for weight in weights]

        load_fast = set_weights

        def make_inner(self, name, settings):
            settings = dict(settings)
            if name == "adam":
                settings["eps"] = settings.pop("epsilon")
            return (optax.adam if name == "adam" else optax.sgd)(**settings)

        def build(self):
            self.state = self.optimizer.init(self.params)
            self._update = jax.jit(self.optimizer.update)

        def apply(self, gradients):
            updates, self.state = self._update(gradients, self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)

        def fast(self):
            return [np.array(param) for param in self.params]

        def slow(self):
            return [np.array(one) for one in lookahead_optim.optax.slow_params(self.state, self.params)]

        def save(self):
            return self.fast(), jax.tree.map(np.array, self.state)

        def load(self, saved):
            self.load_fast(saved[0])
            self.state = jax.tree.map(jnp.array, saved[1])

        def sync(self):
            self.params, self.state = lookahead_optim.optax.sync(self.state, self.params)

        def reset_slow_weights(self):
            self.state = lookahead_optim.optax.reset_slow_params(self.state, self.params)

    class OptaxApplyGradients(Optax):
        """The form that returns parameters."""

        exact = True

        def build(self):
            super().build()
            self._step = jax.jit(getattr(self.optimizer, "apply_gradients", self._apply_updates))

        def _apply_updates(self, gradients, state, params):
            updates, state = self.optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        def apply(self, gradients):
            self.params, self.state = self._step(gradients, self.state, self.params)

    ADAPTERS += [Optax, OptaxApplyGradients]

# TensorFlow up to 2.15 has Keras 2 itself, and then there is no `tf_keras`.
if _joins("tf_keras") or (_joins("tensorflow") and importlib.metadata.version("tensorflow") < "2.16"):
    import tensorflow as tf

    import lookahead_optim.tf_keras
    from lookahead_optim.tf_keras._keras import keras as keras_2

    class TfKeras(Adapter):
        lookahead = lookahead_optim.tf_keras.Lookahead

        def set_weights(self, weights):
            self.variables = [tf.Variable(weight) for weight in weights]

        def make_inner(self, name, settings):
            optimizers = keras_2.optimizers.legacy
            return (optimizers.Adam if name == "adam" else optimizers.SGD)(**settings)

        def build(self):
            self.optimizer._create_all_weights(self.variables)

        def apply(self, gradients):
            # With `None`, as `fit` does: a variable that is not in the list counts as frozen.
            tensors = [None if one is None else tf.constant(one) for one in gradients]
            self.optimizer.apply_gradients(zip(tensors, self.variables))

        def fast(self):
            return [one.numpy() for one in self.variables]

        def slow(self):
            return [self.optimizer.get_slot(one, "slow").numpy() for one in self.variables]

    ADAPTERS.append(TfKeras)
