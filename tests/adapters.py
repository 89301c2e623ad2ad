"""Adapters by which the front ends join the conformance suite.

An adapter is a class with the constructor `(weights, inner, settings, sync_period, slow_step_size)`, the class methods
`bare(weights, inner, settings)` and `nested(weights, inner, settings, periods, slow_step_sizes)`, innermost first, and
the methods used below. Arrays are NumPy's, copied in and out.
"""

import os
import warnings

import numpy as np

ADAPTERS = []

if "KERAS_BACKEND" in os.environ:
    import keras

    import lookahead_optim.keras

    def _inner(name, settings):
        return (keras.optimizers.Adam if name == "adam" else keras.optimizers.SGD)(**settings)

    class Keras:
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
