"""Designs in Keras on PyTorch."""

import keras
import torch

from designs.of_torch import in_pieces, whole
from programs import of_keras
from programs.of_keras import INNER


class Designed:
    """An optimizer that calls `sync()` at the end of a cycle."""

    def __init__(self, inner, period):
        self.inner, self.period, self.count = inner, period, 0

    def build(self, weights):
        self.inner.build(weights)
        self.fast = weights
        self.make_slow()

    def apply(self, gradients, weights):
        self.inner.apply(gradients, weights)
        self.count += 1
        if self.count % self.period == 0:
            self.sync()


class Variables(Designed):
    """Slow weights are Keras' variables; their tensors, and those of the fast ones, are read at each sync."""

    arithmetic = staticmethod(whole)

    def make_slow(self):
        self.slow = [keras.Variable(weight.value.detach().clone()) for weight in self.fast]

    def sync(self):
        self.arithmetic(*([variable.value for variable in variables] for variables in (self.fast, self.slow)))


class VariablesInPieces(Variables):
    """The same, in pieces that the cache holds."""

    arithmetic = staticmethod(in_pieces(2**19))


class Tensors(Designed):
    """Slow weights are tensors; only the fast weights' are read at each sync."""

    def make_slow(self):
        self.slow = [weight.value.detach().clone() for weight in self.fast]

    def sync(self):
        whole([weight.value for weight in self.fast], self.slow)


class KeptTensors(Tensors):
    """All tensors are read once: a weight that is replaced later, or by a stateless scope, would be missed."""

    def make_slow(self):
        super().make_slow()
        self.tensors = [weight.value for weight in self.fast]

    def sync(self):
        whole(self.tensors, self.slow)


class OneArray(Tensors):
    """Slow weights are views of one array."""

    def make_slow(self):
        tensors = [weight.value.detach() for weight in self.fast]
        parts = torch.cat([one.flatten() for one in tensors]).split([one.numel() for one in tensors])
        self.slow = [part.view_as(one) for part, one in zip(parts, tensors)]


class Operations(Variables):
    """Keras' own operations, one weight after the other."""

    def sync(self):
        for fast, slow in zip(self.fast, self.slow):
            slow.assign_add(0.5 * (fast - slow))
            fast.assign(slow)


DESIGNS = {
    "tensors of variables, whole lists": Variables,
    "tensors of variables, pieces of 512 KiB": VariablesInPieces,
    "slow weights as tensors, whole lists": Tensors,
    "tensors read once, whole lists": KeptTensors,
    "slow weights in one array, whole lists": OneArray,
    "Keras' operations, one weight after the other": Operations,
}


def optimizers(case):
    """Return functions that make the optimizers to compare, by name; the bare one comes first."""
    made = of_keras.optimizers(case)
    for name, design in DESIGNS.items():
        made[name] = lambda design=design: design(INNER[case.inner](), case.period)
    return made
