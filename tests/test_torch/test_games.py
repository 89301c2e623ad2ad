"""Adversarial training: two players, each with its own wrapped optimizer, synchronise at the same steps."""

import pytest
import torch

from lookahead_optim.torch import Lookahead

STEP_SIZE = 0.1
START = 1.0, 0.5


def play(steps, wrap):
    """Let x minimise x y and y maximise it by simultaneous gradient steps. Return the distance from the equilibrium."""
    x, y = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in START)
    players = [(one, wrap(torch.optim.SGD([one], STEP_SIZE))) for one in (x, y)]
    distances = [float(torch.hypot(x, y).detach())]
    for _ in range(steps):
        for (one, _), loss in zip(players, (x * y, -x * y)):
            (one.grad,) = torch.autograd.grad(loss, one)
        for _, optimizer in players:
            optimizer.step()
        distances.append(float(torch.hypot(x, y).detach()))
    return distances


def growth(sync_period, slow_step_size):
    """Return the factor of a whole cycle. In the plane of x and y a step is a multiplication by 1 + i STEP_SIZE."""
    return abs(1 - slow_step_size + slow_step_size * (1 + 1j * STEP_SIZE) ** sync_period)


@pytest.mark.parametrize(
    ("sync_period", "slow_step_size", "factor"),
    [(1, 0.5, 1.0012492197), (5, 0.5, 0.9813269142), (60, 0.5, 1.1607691949), (20, 0.25, None), (5, 1.0, None)],
)
def test_the_bilinear_game_grows_or_shrinks_by_the_closed_form(sync_period, slow_step_size, factor):
    cycles = 40
    distances = play(cycles * sync_period, lambda inner: Lookahead(inner, sync_period, slow_step_size))
    measured = distances[sync_period] / distances[0]
    assert measured == pytest.approx(growth(sync_period, slow_step_size), rel=1e-12)
    assert factor is None or measured == pytest.approx(factor, abs=1e-10)
    for cycle in range(cycles + 1):
        assert distances[cycle * sync_period] == pytest.approx(distances[0] * measured**cycle, rel=1e-10)


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Lookahead(inner, 0)])
def test_the_game_without_lookahead_diverges(wrap):
    distances = play(200, wrap)
    assert distances[-1] == pytest.approx(distances[0] * abs(1 + 1j * STEP_SIZE) ** 200, rel=1e-10)
    assert distances[-1] > 2 * distances[0]


def test_inside_a_cycle_the_fast_weights_play_on_from_the_slow_ones():
    distances = play(20, lambda inner: Lookahead(inner, 5, 0.5))
    for step, distance in enumerate(distances):
        cycles, rest = divmod(step, 5)
        expected = distances[0] * growth(5, 0.5) ** cycles * abs(1 + 1j * STEP_SIZE) ** rest
        assert distance == pytest.approx(expected, rel=1e-12)
