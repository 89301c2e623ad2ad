"""The oracle: Lookahead (arXiv 1907.08610, Algorithm 1) over three inner optimizers, in float64 NumPy.

With slow momentum it is the outer step of SNOO (arXiv 2510.15830) and, on one worker, DiLoCo (arXiv 2311.08105).

    oracle = Lookahead(Adam(0.1), sync_period=5, slow_step_size=0.5).start(weights)
    oracle.apply(gradients)

`weights` and `gradients` are lists of arrays; a gradient may be `None`. Afterwards the fast weights are in
`oracle.weights`, and the slow weights in `oracle.slow`. The inner optimizer may be another `Lookahead`. At a sync of
the outer `Lookahead` all weights of the inner one restart too.
"""

import numpy as np


class Optimizer:
    """Updates `weights` one after the other with the `update` of a subclass."""

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
    """The outer step after every `sync_period` updates."""

    def __init__(self, inner, sync_period=6, slow_step_size=0.5, slow_momentum=0.0, slow_nesterov=True):
        self.inner, self.sync_period, self.slow_step_size = inner, sync_period, slow_step_size
        self.slow_momentum, self.slow_nesterov = slow_momentum, slow_nesterov

    def start(self, weights):
        self.inner.start(weights)
        self.t = 0
        self.reset()
        return self

    @property
    def weights(self):
        return self.inner.weights

    def reset(self):
        """Capture the slow weights, and forget the momentum."""
        self.slow = [weight.copy() for weight in self.weights]
        self.b = [np.zeros_like(weight) for weight in self.weights]
        self.t_of_sync = self.t

    def restart(self, weights):
        """Continue from the weights to which a wrapper around has synchronised. The momentum stays."""
        self.slow = [weight.copy() for weight in weights]
        self.inner.restart(weights)
        self.t_of_sync = self.t

    def apply(self, gradients):
        self.inner.apply(gradients)
        self.t += 1
        if self.sync_period and self.t % self.sync_period == 0:
            self.outer_step()

    def sync(self):
        """Make the outer step now. Without an update since the last sync there is nothing to do."""
        if self.t != self.t_of_sync:
            self.outer_step()

    def outer_step(self):
        new = []
        for index, (slow, fast) in enumerate(zip(self.slow, self.weights)):
            s = slow - fast
            b = self.b[index] = self.slow_momentum * self.b[index] + s
            d = s + self.slow_momentum * b if self.slow_nesterov else b
            new.append(slow - self.slow_step_size * d)
        self.restart(new)
