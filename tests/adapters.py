"""Adapters by which the front ends join the conformance suite.

An adapter is a class with the constructor `(weights, inner, settings, sync_period, slow_step_size)`, the class methods
`bare(weights, inner, settings)` and `nested(weights, inner, settings, periods, slow_step_sizes)`, innermost first, and
the methods used below. Arrays are NumPy's, copied in and out. `oracle_settings` make the oracle's inner optimizers
like the framework's; `without_gradient` returns what stands for a gradient that is missing. Where a sync is not
`exact`, it ends one rounding beside the slow weights that it computes.

With `KERAS_BACKEND` set, that of Keras 3 joins, as it has one backend per process; otherwise all others do that are
installed.
"""

import copy
import importlib.metadata
import importlib.util
import os
import warnings
from typing import ClassVar

import numpy as np

ADAPTERS = []


def _joins(framework):
    return "KERAS_BACKEND" not in os.environ and importlib.util.find_spec(framework) is not None


if "KERAS_BACKEND" in os.environ:
    import keras

    import lookahead_optim.keras

    def _inner(name, settings):
        return (keras.optimizers.Adam if name == "adam" else keras.optimizers.SGD)(**settings)

    class Keras:
        oracle_settings: ClassVar = {}
        exact = True

        @staticmethod
        def without_gradient(gradient):
            return None

        def __init__(self, weights, inner, settings, sync_period, slow_step_size):
            self._start(weights, lookahead_optim.keras.Lookahead(_inner(inner, settings), sync_period, slow_step_size))

        def _start(self, weights, optimizer):
            self.variables = [keras.Variable(weight) for weight in weights]
            self.optimizer = optimizer
            self.optimizer.build(self.variables)

        @classmethod
        def bare(cls, weights, inner, settings):
            run = cls.__new__(cls)
            run._start(weights, _inner(inner, settings))
            return run

        @classmethod
        def nested(cls, weights, inner, settings, periods, slow_step_sizes):
            optimizer = _inner(inner, settings)
            for period, step_size in zip(periods, slow_step_sizes):
                optimizer = lookahead_optim.keras.Lookahead(optimizer, period, step_size)
            run = cls.__new__(cls)
            run._start(weights, optimizer)
            return run

        def apply(self, gradients):
            tensors = [None if one is None else keras.ops.convert_to_tensor(one) for one in gradients]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Gradients do not exist for variables")
                self.optimizer.apply(tensors, self.variables)

        def fast(self):
            return [np.array(keras.ops.convert_to_numpy(one.value)) for one in self.variables]

        def slow(self):
            return [np.array(keras.ops.convert_to_numpy(one.value)) for one in self.optimizer.slow_variables]

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

    ADAPTERS.append(Keras)

if _joins("torch"):
    import torch

    import lookahead_optim.torch

    def _inner_optimizer(parameters, name, settings):
        names = {"learning_rate": "lr", "epsilon": "eps"}
        settings = {names.get(key, key): value for key, value in settings.items()}
        return (torch.optim.Adam if name == "adam" else torch.optim.SGD)(parameters, **settings)

    class Torch:
        oracle_settings: ClassVar = {"adam": {"pytorch": True}}
        exact = True

        @staticmethod
        def without_gradient(gradient):
            return None

        def __init__(self, weights, inner, settings, sync_period, slow_step_size):
            self._start(weights)
            self.optimizer = lookahead_optim.torch.Lookahead(
                _inner_optimizer(self.parameters, inner, settings), sync_period, slow_step_size
            )

        def _start(self, weights):
            self.parameters = [torch.nn.Parameter(torch.tensor(weight)) for weight in weights]

        @classmethod
        def bare(cls, weights, inner, settings):
            run = cls.__new__(cls)
            run._start(weights)
            run.optimizer = _inner_optimizer(run.parameters, inner, settings)
            return run

        @classmethod
        def nested(cls, weights, inner, settings, periods, slow_step_sizes):
            run = cls.bare(weights, inner, settings)
            for period, step_size in zip(periods, slow_step_sizes):
                run.optimizer = lookahead_optim.torch.Lookahead(run.optimizer, period, step_size)
            return run

        def apply(self, gradients):
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = None if gradient is None else torch.tensor(gradient)
            self.optimizer.step()

        def fast(self):
            return [parameter.detach().numpy().copy() for parameter in self.parameters]

        def slow(self):
            states = [self.optimizer.state[parameter] for parameter in self.parameters]
            # That of the outermost wrapper.
            name = max(key for key in states[0] if key.startswith("slow"))
            return [state[name].numpy().copy() for state in states]

        @torch.no_grad()
        def load_fast(self, weights):
            for parameter, weight in zip(self.parameters, weights):
                parameter.copy_(torch.tensor(weight))

        def save(self):
            return self.fast(), copy.deepcopy(self.optimizer.state_dict())

        def load(self, saved):
            self.load_fast(saved[0])
            self.optimizer.load_state_dict(saved[1])

        def sync(self):
            self.optimizer.sync()

        def reset_slow_weights(self):
            self.optimizer.reset_slow_weights()

    ADAPTERS.append(Torch)

if _joins("optax"):
    import jax
    import jax.numpy as jnp
    import optax

    import lookahead_optim.optax

    def _inner_transformation(name, settings):
        settings = dict(settings)
        if name == "adam":
            settings["eps"] = settings.pop("epsilon")
        return (optax.adam if name == "adam" else optax.sgd)(**settings)

    class Optax:
        oracle_settings: ClassVar = {"adam": {"pytorch": True}}
        exact = False

        @staticmethod
        def without_gradient(gradient):
            return np.zeros_like(gradient)

        def __init__(self, weights, inner, settings, sync_period, slow_step_size):
            inner = _inner_transformation(inner, settings)
            self._start(weights, lookahead_optim.optax.lookahead(inner, sync_period, slow_step_size))

        def _start(self, weights, optimizer):
            self.params = [jnp.array(weight) for weight in weights]
            self.state = optimizer.init(self.params)
            self._update = jax.jit(optimizer.update)

        @classmethod
        def bare(cls, weights, inner, settings):
            run = cls.__new__(cls)
            run._start(weights, _inner_transformation(inner, settings))
            return run

        @classmethod
        def nested(cls, weights, inner, settings, periods, slow_step_sizes):
            optimizer = _inner_transformation(inner, settings)
            for period, step_size in zip(periods, slow_step_sizes):
                optimizer = lookahead_optim.optax.lookahead(optimizer, period, step_size)
            run = cls.__new__(cls)
            run._start(weights, optimizer)
            return run

        def apply(self, gradients):
            updates, self.state = self._update(gradients, self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)

        def fast(self):
            return [np.array(param) for param in self.params]

        def slow(self):
            return [np.array(one) for one in lookahead_optim.optax.slow_params(self.state, self.params)]

        def load_fast(self, weights):
            self.params = [jnp.array(weight) for weight in weights]

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

        def _start(self, weights, optimizer):
            super()._start(weights, optimizer)
            self._step = jax.jit(
                getattr(optimizer, "apply_gradients", lambda *args: _apply_gradients(optimizer, *args))
            )

        def apply(self, gradients):
            self.params, self.state = self._step(gradients, self.state, self.params)

    def _apply_gradients(optimizer, gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    ADAPTERS += [Optax, OptaxApplyGradients]

# TensorFlow up to 2.15 has Keras 2 itself, and then there is no `tf_keras`.
if _joins("tf_keras") or (_joins("tensorflow") and importlib.metadata.version("tensorflow") < "2.16"):
    import tensorflow as tf

    import lookahead_optim.tf_keras
    from lookahead_optim.tf_keras._keras import keras as keras_2

    def _legacy_optimizer(name, settings):
        optimizers = keras_2.optimizers.legacy
        return (optimizers.Adam if name == "adam" else optimizers.SGD)(**settings)

    class TfKeras:
        oracle_settings: ClassVar = {}
        exact = True

        @staticmethod
        def without_gradient(gradient):
            return None

        def __init__(self, weights, inner, settings, sync_period, slow_step_size):
            inner = _legacy_optimizer(inner, settings)
            self._start(weights, lookahead_optim.tf_keras.Lookahead(inner, sync_period, slow_step_size))

        def _start(self, weights, optimizer):
            self.variables = [tf.Variable(weight) for weight in weights]
            self.optimizer = optimizer
            self.optimizer._create_all_weights(self.variables)

        @classmethod
        def bare(cls, weights, inner, settings):
            run = cls.__new__(cls)
            run._start(weights, _legacy_optimizer(inner, settings))
            return run

        @classmethod
        def nested(cls, weights, inner, settings, periods, slow_step_sizes):
            optimizer = _legacy_optimizer(inner, settings)
            for period, step_size in zip(periods, slow_step_sizes):
                optimizer = lookahead_optim.tf_keras.Lookahead(optimizer, period, step_size)
            run = cls.__new__(cls)
            run._start(weights, optimizer)
            return run

        def apply(self, gradients):
            tensors = [None if one is None else tf.constant(one) for one in gradients]
            self.optimizer.apply_gradients([pair for pair in zip(tensors, self.variables) if pair[0] is not None])

        def fast(self):
            return [one.numpy() for one in self.variables]

        def slow(self):
            return [self.optimizer.get_slot(one, "slow").numpy() for one in self.variables]

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

    ADAPTERS.append(TfKeras)
