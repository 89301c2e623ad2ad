"""The oracle: Lookahead (arXiv 1907.08610, Algorithm 1) over three inner optimizers, in float64 NumPy.

A run is `Lookahead(Adam(0.1), sync_period=5, slow_step_size=0.5)` and calls of `apply(gradients)`; the fast weights
are in `weights`, the slow ones in `slow`. Weights and gradients are lists of arrays; a gradient may be `None`.
"""

import numpy as np


class SGD:
    """v <- momentum v - lr g;  w <- w + v  (with Nesterov: w <- w + momentum v - lr g)."""

    def __init__(self, learning_rate, momentum=0.0, nesterov=False):
        self.learning_rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov
        self.velocity = {}

    def update(self, index, weight, gradient):
        step = -self.learning_rate * gradient
        velocity = self.momentum * self.velocity.get(index, 0.0) + step
        self.velocity[index] = velocity
        return weight + (self.momentum * velocity + step if self.nesterov else velocity)


class Adam:
    """Kingma and Ba (arXiv 1412.6980), Section 2, the order of computation before "we can also"."""

    def __init__(self, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.learning_rate, self.beta_1, self.beta_2, self.epsilon = learning_rate, beta_1, beta_2, epsilon
        self.moments = {}

    def update(self, index, weight, gradient):
        t, m, v = self.moments.get(index, (0, 0.0, 0.0))
        t += 1
        m = self.beta_1 * m + (1 - self.beta_1) * gradient
        v = self.beta_2 * v + (1 - self.beta_2) * gradient**2
        self.moments[index] = t, m, v
        # Keras' epsilon is the paper's "epsilon hat": outside of the bias correction.
        step_size = self.learning_rate * np.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return weight - step_size * m / (np.sqrt(v) + self.epsilon)


class Lookahead:
    """Every `sync_period` updates: slow <- slow + slow_step_size (fast - slow), then fast <- slow."""

    def __init__(self, inner, sync_period=6, slow_step_size=0.5):
        self.inner, self.sync_period, self.slow_step_size = inner, sync_period, slow_step_size
        self.t = 0

    def start(self, weights):
        self.weights = [np.array(weight, "float64") for weight in weights]
        return self

    def update(self, index, weight, gradient):
        """What an outer wrapper needs of an inner optimizer is one weight's update, so nest by `Nested`."""
        raise NotImplementedError

    def apply(self, gradients):
        if self.t == 0:
            self.slow = [weight.copy() for weight in self.weights]
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self.weights[index] = self.inner.update(index, self.weights[index], np.asarray(gradient, "float64"))
        self.t += 1
        if self.sync_period and self.t % self.sync_period == 0:
            self.sync()

    def sync(self):
        self.slow = [slow + self.slow_step_size * (fast - slow) for slow, fast in zip(self.slow, self.weights)]
        self.weights = [slow.copy() for slow in self.slow]
