"""The oracle: Lookahead (arXiv 1907.08610, Algorithm 1) over three inner optimizers, in float64 NumPy.

    oracle = Lookahead(Adam(0.1), sync_period=5, slow_step_size=0.5).start(weights)
    oracle.apply(gradients)

`weights` and `gradients` are lists of arrays; a gradient may be `None`. Afterwards the fast weights are in
`oracle.weights`, the slow ones in `oracle.slow`. The inner optimizer may be another `Lookahead`, all of whose weights
restart from those that the outer one has synchronised.
"""

import numpy as np


class Optimizer:
    """Updates `weights` one by one with the `update` of a subclass."""

    def start(self, weights):
        self.weights = [np.array(weight, "float64") for weight in weights]
        self.state = [self.initial_state(weight) for weight in self.weights]
        self.t = 0
        return self

    def restart(self, weights):
        self.weights = [weight.copy() for weight in weights]

    def apply(self, gradients):
        self.t += 1
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                gradient = np.asarray(gradient, "float64")
                self.weights[index] = self.weights[index] + self.update(self.state[index], gradient)


class SGD(Optimizer):
    """v <- momentum v - lr g;  w <- w + v.  With Nesterov:  w <- w + momentum v - lr g."""

    def __init__(self, learning_rate, momentum=0.0, nesterov=False):
        self.learning_rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov

    def initial_state(self, weight):
        return {"v": np.zeros_like(weight)}

    def update(self, state, gradient):
        state["v"] = self.momentum * state["v"] - self.learning_rate * gradient
        return self.momentum * state["v"] - self.learning_rate * gradient if self.nesterov else state["v"]


class Adam(Optimizer):
    """Kingma and Ba (arXiv 1412.6980), with the efficient order of computation given before its Section 2.1.

    With `pytorch`, as there: a weight's `t` counts its own updates, and epsilon is added as in Algorithm 1.
    """

    def __init__(self, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7, pytorch=False):
        self.learning_rate, self.beta_1, self.beta_2, self.epsilon = learning_rate, beta_1, beta_2, epsilon
        self.pytorch = pytorch

    def initial_state(self, weight):
        return {"m": np.zeros_like(weight), "v": np.zeros_like(weight), "t": 0}

    def update(self, state, gradient):
        state["t"] = state["t"] + 1 if self.pytorch else self.t
        state["m"] = self.beta_1 * state["m"] + (1 - self.beta_1) * gradient
        state["v"] = self.beta_2 * state["v"] + (1 - self.beta_2) * gradient**2
        correction = np.sqrt(1 - self.beta_2 ** state["t"])
        step_size = self.learning_rate * correction / (1 - self.beta_1 ** state["t"])
        epsilon = self.epsilon * correction if self.pytorch else self.epsilon
        return -step_size * state["m"] / (np.sqrt(state["v"]) + epsilon)


class Lookahead:
    """After every `sync_period` updates:  slow <- slow + slow_step_size (fast - slow);  fast <- slow."""

    def __init__(self, inner, sync_period=6, slow_step_size=0.5):
        self.inner, self.sync_period, self.slow_step_size = inner, sync_period, slow_step_size

    def start(self, weights):
        self.inner.start(weights)
        self.slow = [weight.copy() for weight in self.weights]
        self.t = 0
        return self

    @property
    def weights(self):
        return self.inner.weights

    def restart(self, weights):
        self.slow = [weight.copy() for weight in weights]
        self.inner.restart(weights)

    def apply(self, gradients):
        self.inner.apply(gradients)
        self.t += 1
        if self.sync_period and self.t % self.sync_period == 0:
            self.sync()

    def sync(self):
        self.restart([slow + self.slow_step_size * (fast - slow) for slow, fast in zip(self.slow, self.weights)])
