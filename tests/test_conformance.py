"""One suite for all front ends. Each joins with an adapter and is compared with the oracle and with closed forms."""

import numpy as np
import pytest

from tests import reference
from tests.adapters import ADAPTERS
from tests.comparison import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`slow_step_size` above 1:UserWarning")

# Settings that all frameworks' own optimizers have, under the oracle's names.
INNER = {
    "sgd": (reference.SGD, {"learning_rate": 0.1}),
    "momentum": (reference.SGD, {"learning_rate": 0.05, "momentum": 0.9}),
    "nesterov": (reference.SGD, {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (reference.Adam, {"learning_rate": 0.05, "epsilon": 1e-7}),
}
SHAPES = [(3, 4), (5,), ()]


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.__name__)
def adapter(request):
    return request.param


@pytest.fixture(params=[adapter for adapter in ADAPTERS if adapter.has_momentum], ids=lambda adapter: adapter.__name__)
def with_momentum(request):
    return request.param


def make_weights(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for shape in SHAPES]


def make_gradients(steps, seed=1):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=shape).astype("float32") for shape in SHAPES] for _ in range(steps)]


def both(adapter, inner, sync_period, slow_step_size, weights, **outer):
    """Return the adapter's run and the oracle's, ready for their first step."""
    optimizer, settings = INNER[inner]
    inner_oracle = optimizer(**settings, **adapter.oracle_settings.get(inner, {}))
    oracle = reference.Lookahead(inner_oracle, sync_period, slow_step_size, **outer).start(weights)
    return adapter(weights, inner, settings, sync_period, slow_step_size, **outer), oracle


def scalar_run(adapter, settings, sync_period, slow_step_size, start=1.0, **outer):
    inner = "momentum" if "momentum" in settings else "sgd"
    return adapter([np.array([start], "float32")], inner, settings, sync_period, slow_step_size, **outer)


def assert_close(actual, expected, tolerance=1e-5):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("sync_period", "slow_step_size"), [(5, 0.5), (6, 0.8), (3, 0.0), (2, 1.0), (1, 0.5), (4, 1.5)]
)
def test_trajectory_is_the_oracles(adapter, inner, sync_period, slow_step_size):
    run, oracle = both(adapter, inner, sync_period, slow_step_size, make_weights())
    for gradients in make_gradients(15):
        run.apply(gradients)
        oracle.apply(gradients)
        assert_close(run.fast(), oracle.weights)
        assert_close(run.slow(), oracle.slow)


@pytest.mark.parametrize("inner", INNER)
def test_weight_without_gradient_takes_part_in_the_sync(adapter, inner):
    if inner in adapter.inner_without_missing_gradients:
        pytest.skip("The bare optimizer fails.")
    run, oracle = both(adapter, inner, 3, 0.5, make_weights())
    for step, gradients in enumerate(make_gradients(9)):
        gradients[step % 2] = adapter.without_gradient(gradients[step % 2])
        run.apply(gradients)
        oracle.apply(gradients)
        assert_close(run.fast(), oracle.weights)
        assert_close(run.slow(), oracle.slow)


def test_ten_number_trajectory_of_constant_gradient(adapter):
    run = scalar_run(adapter, {"learning_rate": 0.1}, 5, 0.5)
    trajectory = []
    for _ in range(10):
        run.apply([np.ones(1, "float32")])
        trajectory.append(run.fast()[0][0])
    np.testing.assert_allclose(trajectory, [0.9, 0.8, 0.7, 0.6, 0.75, 0.65, 0.55, 0.45, 0.35, 0.5], rtol=1e-6)


def test_fast_and_slow_are_equal_bit_for_bit_after_a_sync(adapter):
    run = adapter(make_weights(), "adam", INNER["adam"][1], 3, 0.3)
    for step, gradients in enumerate(make_gradients(9), 1):
        run.apply(gradients)
        if step % 3 == 0:
            assert_same_bits(run.fast(), run.slow())


def test_slow_weights_do_not_change_between_syncs(adapter):
    run = adapter(make_weights(), "adam", INNER["adam"][1], 4, 0.5)
    before = make_weights()
    for step, gradients in enumerate(make_gradients(8), 1):
        run.apply(gradients)
        if step % 4 == 0:
            before = run.slow()
        assert_same_bits(run.slow(), before)


@pytest.mark.parametrize(("sync_period", "slow_step_size"), [(0, 0.5), (3, 1.0), (1, 1.0), (100, 0.5)])
@pytest.mark.parametrize("inner", INNER)
def test_is_the_inner_optimizer_bit_for_bit_when_the_slow_step_is_none_or_whole(
    adapter, inner, sync_period, slow_step_size
):
    settings = INNER[inner][1]
    run = adapter(make_weights(), inner, settings, sync_period, slow_step_size)
    bare = adapter.bare(make_weights(), inner, settings)
    for gradients in make_gradients(7):
        run.apply(gradients)
        bare.apply(gradients)
        assert_same_bits(run.fast(), bare.fast())


def test_slow_step_size_zero_returns_to_the_start_bit_for_bit(adapter):
    run = adapter(make_weights(), "sgd", {"learning_rate": 0.1}, 4, 0.0)
    for gradients in make_gradients(4):
        run.apply(gradients)
    if adapter.exact:
        assert_same_bits(run.fast(), make_weights())
    assert_close(run.fast(), make_weights(), tolerance=1e-7)


def test_slow_weights_are_captured_at_the_first_step_and_not_before(adapter):
    run, _ = both(adapter, "momentum", 2, 0.5, make_weights())
    loaded = make_weights(seed=7)
    run.load_fast(loaded)
    oracle = reference.Lookahead(reference.SGD(**INNER["momentum"][1]), 2, 0.5).start(loaded)
    for gradients in make_gradients(4):
        run.apply(gradients)
        oracle.apply(gradients)
        assert_close(run.fast(), oracle.weights)


def test_reset_captures_again(adapter):
    run = adapter(make_weights(), "sgd", {"learning_rate": 0.1}, 4, 0.5)
    gradients = make_gradients(4)
    for step in gradients[:2]:
        run.apply(step)
    loaded = make_weights(seed=7)
    run.load_fast(loaded)
    run.reset_slow_weights()
    assert_same_bits(run.slow(), loaded)
    for step in gradients[2:]:
        run.apply(step)
    oracle = reference.Lookahead(reference.SGD(0.1), 2, 0.5).start(loaded)
    for step in gradients[2:]:
        oracle.apply(step)
    assert_close(run.fast(), oracle.weights)


@pytest.mark.parametrize("steps", range(1, 5))
def test_sync_is_the_oracles_and_idempotent(adapter, steps):
    run, oracle = both(adapter, "adam", 4, 0.3, make_weights())
    for gradients in make_gradients(steps):
        run.apply(gradients)
        oracle.apply(gradients)
    run.sync()
    oracle.sync()
    assert_close(run.fast(), oracle.weights)
    assert_same_bits(run.fast(), run.slow())
    once = run.fast()
    run.sync()
    assert_same_bits(run.fast(), once)
    assert_same_bits(run.slow(), once)


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("inner", INNER)
def test_resume_at_every_position_of_a_cycle_is_bit_for_bit(adapter, inner, position):
    settings = INNER[inner][1]
    gradients = make_gradients(14)
    run = adapter(make_weights(), inner, settings, 6, 0.5)
    for step in gradients[:position]:
        run.apply(step)
    resumed = adapter(make_weights(seed=9), inner, settings, 6, 0.5)
    resumed.load(run.save())
    for step in gradients[position:]:
        run.apply(step)
        resumed.apply(step)
        assert_same_bits(resumed.fast(), run.fast())
    assert_same_bits(resumed.slow(), run.slow())


@pytest.mark.parametrize(
    ("step", "sync_period", "slow_step_size"),
    [(0.1, 5, 0.5), (0.5, 5, 0.5), (0.1, 20, 0.2)],
)
def test_noisy_quadratic_has_the_stationary_variance_of_the_closed_form(adapter, step, sync_period, slow_step_size):
    # Loss (x - c)^2 / 2 with c ~ N(0, 1), for many independent x at once. The variance of the slow weights divided by
    # the variance of SGD is alpha (1 + r^k) / (2 - alpha (1 - r^k)), r = 1 - step (arXiv 1907.08610, Proposition 2).
    count, cycles = 4_000, 2_400 // sync_period
    rng = np.random.default_rng(0)
    run = adapter(
        [rng.normal(size=count).astype("float32") * 0.2], "sgd", {"learning_rate": step}, sync_period, slow_step_size
    )
    squares, samples = 0.0, 0
    for cycle in range(cycles):
        for _ in range(sync_period):
            run.apply([run.fast()[0] - rng.normal(size=count).astype("float32")])
        if cycle >= cycles // 8:
            squares += float(np.sum(run.slow()[0].astype("float64") ** 2))
            samples += count
    r = 1 - step
    sgd = step**2 / (1 - r**2)
    expected = slow_step_size * (1 + r**sync_period) / (2 - slow_step_size * (1 - r**sync_period))
    assert squares / samples / sgd == pytest.approx(expected, rel=0.01)


def test_heavy_ball_converges_at_the_spectral_radius(adapter):
    # Quadratic with curvature l, momentum b, step g: B maps (velocity, weight). Lookahead averages the weight and does
    # not change the velocity.
    b, curvature, g, k, alpha = 0.9, 3.0, 0.1, 5, 0.5
    one_step = np.array([[1 - g * curvature, b], [-g * curvature, b]])
    cycle = np.diag([alpha, 1]) @ np.linalg.matrix_power(one_step, k) + np.diag([1 - alpha, 0])
    expected = max(abs(np.linalg.eigvals(cycle))) ** (1 / k)
    assert expected == pytest.approx(0.9179757811, abs=1e-9)

    run = scalar_run(adapter, {"learning_rate": g, "momentum": b}, k, alpha, start=1e15)
    oracle = reference.Lookahead(reference.SGD(g, b), k, alpha).start([[1e15]])
    norms = []
    for _ in range(120 * k):
        gradient = curvature * run.fast()[0]
        run.apply([gradient])
        oracle.apply([curvature * oracle.weights[0]])
        norms.append(np.hypot(*oracle.weights[0], *oracle.inner.state[0]["v"]))
    # Averaged over 100 cycles, the phase of the complex eigenvalue hardly matters.
    rate = (norms[-1] / norms[20 * k - 1]) ** (1 / (100 * k))
    assert rate == pytest.approx(expected, abs=2e-3)
    assert abs(run.fast()[0][0] - oracle.weights[0][0]) < 1e-4 * norms[-1]


@pytest.mark.parametrize(
    ("sync_period", "rate"), [(5, 0.9813269142), (1, 1.0012492197), (60, 1.1607691949), (0, 1.00498756)]
)
def test_bilinear_game_converges_or_diverges_as_the_closed_form_says(adapter, sync_period, rate):
    g, alpha = 0.1, 0.5
    steps = 120
    run = adapter([np.ones(1, "float32"), np.ones(1, "float32")], "sgd", {"learning_rate": g}, sync_period, alpha)
    for _ in range(steps):
        x, y = run.fast()
        run.apply([y, -x])
    growth = np.hypot(*run.fast())[0] / np.sqrt(2)
    expected = rate ** (steps / sync_period) if sync_period else rate**steps
    assert growth == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("r", [0.9**5, 0.0])
@pytest.mark.parametrize("part_of_the_limit", [0.75, 0.99, 1.0, 1.01])
def test_over_relaxation_converges_below_the_limit_that_the_warning_names(adapter, r, part_of_the_limit):
    # SGD on a quadratic multiplies the error by r in a cycle. So a cycle multiplies the error of the slow weights by 1
    # - slow_step_size (1 - r). Beyond 2 / (1 - r) that is less than -1.
    slow_step_size = part_of_the_limit * 2 / (1 - r)
    run = scalar_run(adapter, {"learning_rate": 1 - r ** (1 / 5)}, 5, slow_step_size)
    for _ in range(20 * 5):
        run.apply([run.fast()[0]])
    factor = 1 - slow_step_size * (1 - r)
    assert abs(factor) == pytest.approx(abs(1 - 2 * part_of_the_limit))
    assert run.fast()[0][0] == pytest.approx(factor**20, rel=1e-4)


def test_nested_wrappers_have_the_product_rate(adapter):
    # Gradient w and step 0.1 multiply w by r = 0.9. The outer period, 30 updates, is six inner periods. All weights
    # restart from the outer sync, so each 30 updates multiply w by 1/2 + (1/2 + r^5 / 2)^6 / 2.
    weights = [np.ones(1, "float32")]
    run = adapter.nested(weights, "sgd", {"learning_rate": 0.1}, periods=(5, 30), slow_step_sizes=(0.5, 0.5))
    for cycle in range(1, 4):
        for _ in range(30):
            run.apply([run.fast()[0]])
        assert run.fast()[0][0] == pytest.approx(0.6264665547901707**cycle, rel=1e-6)


@pytest.mark.parametrize("periods", [(5, 6), (6, 5), (3, 3), (2, 4)])
def test_nested_trajectory_is_the_oracles(adapter, periods):
    settings = INNER["adam"][1]
    run = adapter.nested(make_weights(), "adam", settings, periods, slow_step_sizes=(0.5, 0.3))
    inner = reference.Lookahead(reference.Adam(**settings), periods[0], 0.5)
    oracle = reference.Lookahead(inner, periods[1], 0.3).start(make_weights())
    for gradients in make_gradients(24):
        run.apply(gradients)
        oracle.apply(gradients)
        assert_close(run.fast(), oracle.weights)
        assert_close(run.slow(), oracle.slow)


# The outer step with momentum on the pseudo-gradient.

OUTER = [{"slow_momentum": 0.9}, {"slow_momentum": 0.6}, {"slow_momentum": 0.5, "slow_nesterov": False}]
outer_settings = pytest.mark.parametrize("outer", OUTER, ids=["0.9", "0.6", "heavy ball"])


def train_both(run, oracle, gradients):
    for step in gradients:
        run.apply(step)
        oracle.apply(step)
        assert_close(run.fast(), oracle.weights)
        assert_close(run.slow(), oracle.slow)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("sync_period", "slow_step_size"), [(5, 0.7), (3, 0.0), (2, 1.0), (1, 0.5)])
@outer_settings
def test_trajectory_with_momentum_is_the_oracles(with_momentum, inner, sync_period, slow_step_size, outer):
    run, oracle = both(with_momentum, inner, sync_period, slow_step_size, make_weights(), **outer)
    train_both(run, oracle, make_gradients(15))


@outer_settings
def test_weight_without_gradient_coasts_in_the_outer_step(with_momentum, outer):
    run, oracle = both(with_momentum, "sgd", 3, 0.7, make_weights(), **outer)
    gradients = make_gradients(12)
    for step in gradients[6:]:
        step[0] = with_momentum.without_gradient(step[0])
    train_both(run, oracle, gradients)


@outer_settings
@pytest.mark.parametrize("position", range(1, 9))
def test_sync_with_momentum_is_the_oracles_and_a_second_one_does_nothing(with_momentum, position, outer):
    run, oracle = both(with_momentum, "adam", 4, 0.7, make_weights(), **outer)
    gradients = make_gradients(12)
    train_both(run, oracle, gradients[:position])
    for _ in range(2):
        run.sync()
        oracle.sync()
        assert_close(run.fast(), oracle.weights)
    resumed = with_momentum(make_weights(seed=9), "adam", INNER["adam"][1], 4, 0.7, **outer)
    resumed.load(run.save())
    resumed.sync()
    assert_same_bits(resumed.fast(), run.fast())
    train_both(resumed, oracle, gradients[position:])


@outer_settings
@pytest.mark.parametrize("position", range(9))
def test_resume_with_momentum_at_every_position_of_a_cycle_is_bit_for_bit(with_momentum, position, outer):
    settings, gradients = INNER["adam"][1], make_gradients(12)
    run = with_momentum(make_weights(), "adam", settings, 4, 0.7, **outer)
    for step in gradients[:position]:
        run.apply(step)
    resumed = with_momentum(make_weights(seed=9), "adam", settings, 4, 0.7, **outer)
    resumed.load(run.save())
    for step in gradients[position:]:
        run.apply(step)
        resumed.apply(step)
        assert_same_bits(resumed.fast(), run.fast())
    assert_same_bits(resumed.slow(), run.slow())


@outer_settings
def test_reset_forgets_the_momentum(with_momentum, outer):
    run, oracle = both(with_momentum, "momentum", 2, 0.7, make_weights(), **outer)
    gradients = make_gradients(10)
    train_both(run, oracle, gradients[:5])
    run.reset_slow_weights()
    oracle.reset()
    train_both(run, oracle, gradients[5:])


def test_momentum_of_0_is_the_plain_interpolation_bit_for_bit(with_momentum):
    settings = INNER["adam"][1]
    run, plain = (
        with_momentum(make_weights(), "adam", settings, 3, 0.3, **outer) for outer in ({"slow_momentum": 0.0}, {})
    )
    for gradients in make_gradients(9):
        run.apply(gradients)
        plain.apply(gradients)
        assert_same_bits(run.fast(), plain.fast())


@pytest.mark.parametrize("periods", [(5, 6), (3, 3), (2, 4)])
def test_an_outer_sync_restarts_the_inner_slow_weights_and_keeps_their_momentum(with_momentum, periods):
    settings, sizes, outer = INNER["adam"][1], (0.5, 0.3), ({"slow_momentum": 0.6}, {"slow_momentum": 0.9})
    run = with_momentum.nested(make_weights(), "adam", settings, periods, sizes, outer)
    adam = reference.Adam(**settings, **with_momentum.oracle_settings.get("adam", {}))
    inner = reference.Lookahead(adam, periods[0], sizes[0], **outer[0])
    oracle = reference.Lookahead(inner, periods[1], sizes[1], **outer[1]).start(make_weights())
    train_both(run, oracle, make_gradients(24))


@pytest.mark.parametrize(
    ("slow_nesterov", "expected"),
    [(True, [0.335, -0.6135, -1.81715, -3.250435, -4.8903915]), (False, [0.65, -0.015, -0.9635, -2.16715])],
)
def test_slow_weight_of_a_constant_gradient(with_momentum, slow_nesterov, expected):
    run = scalar_run(with_momentum, {"learning_rate": 0.1}, 5, 0.7, slow_momentum=0.9, slow_nesterov=slow_nesterov)
    trajectory = []
    for _ in expected:
        for _ in range(5):
            run.apply([np.ones(1, "float32")])
        trajectory.append(run.slow()[0][0])
    np.testing.assert_allclose(trajectory, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "sync_period", "slow_step_size", "outer", "expected"),
    [
        (0.1, 30, 0.7, {"slow_momentum": 0.6}, 1.310041384665),
        (0.1, 20, 0.8, {"slow_momentum": 0.75}, 2.032056811208),
        (0.1, 48, 1.0, {"slow_momentum": 0.5, "slow_nesterov": False}, 1.504756880813),
    ],
)
def test_noisy_quadratic_with_momentum_has_the_stationary_variance_of_the_closed_form(
    with_momentum, step, sync_period, slow_step_size, outer, expected
):
    # As above. With p = 1 - eta (1 - r) and r = (1 - step)^k, the variance of the slow weights divided by the variance
    # of SGD is eta (1 + r) ((1 + 2 mu + 2 mu^2) (1 + mu p) - 2 mu (1 + mu)^2 p) / ((1 - mu p) (1 + p (1 + 2 mu))). With
    # heavy ball it is eta (1 + r) (1 + mu) / ((1 - mu) (2 + 2 mu - eta (1 - r))).
    r, mu, eta = (1 - step) ** sync_period, outer["slow_momentum"], slow_step_size
    p = 1 - eta * (1 - r)
    if outer.get("slow_nesterov", True):
        closed = eta * (1 + r) * ((1 + 2 * mu + 2 * mu**2) * (1 + mu * p) - 2 * mu * (1 + mu) ** 2 * p)
        closed /= (1 - mu * p) * (1 + p * (1 + 2 * mu))
    else:
        closed = eta * (1 + r) * (1 + mu) / ((1 - mu) * (2 + 2 * mu - eta * (1 - r)))
    assert closed == pytest.approx(expected, rel=1e-11)
    count, cycles = 20_000, 120
    rng = np.random.default_rng(0)
    start = [rng.normal(size=count).astype("float32") * 0.3]
    run = with_momentum(start, "sgd", {"learning_rate": step}, sync_period, slow_step_size, **outer)
    squares, samples = 0.0, 0
    for cycle in range(cycles):
        for _ in range(sync_period):
            run.apply([run.fast()[0] - rng.normal(size=count).astype("float32")])
        if cycle >= 40:
            squares += float(np.sum(run.slow()[0].astype("float64") ** 2))
            samples += count
    sgd = step**2 / (1 - (1 - step) ** 2)
    assert squares / samples / sgd == pytest.approx(expected, rel=0.01)


def test_quadratic_with_momentum_converges_at_the_rate_of_the_closed_form(with_momentum):
    # Where (1 + mu)^2 p < 4 mu, the rate per cycle is sqrt(mu p), with p = 1 - eta (1 - r) and r = (1 - step)^k.
    step, k, eta, mu = 0.1, 5, 0.7, 0.9
    rate = np.sqrt(mu * (1 - eta * (1 - (1 - step) ** k)))
    assert rate == pytest.approx(0.8012544540, abs=1e-10)
    run = scalar_run(with_momentum, {"learning_rate": step}, k, eta, start=1e15, slow_momentum=mu)
    oracle = reference.Lookahead(reference.SGD(step), k, eta, mu).start([[1e15]])
    norms = []
    for _ in range(120):
        for _ in range(k):
            run.apply([run.fast()[0]])
            oracle.apply([oracle.weights[0]])
        norms.append(np.hypot(*oracle.slow[0], *oracle.b[0]))
        assert abs(run.slow()[0][0] - oracle.slow[0][0]) < 1e-4 * norms[-1]
    assert (norms[-1] / norms[19]) ** (1 / 100) == pytest.approx(rate, abs=3e-3)
