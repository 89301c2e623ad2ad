"""The modes and cases of the benchmark suite."""

import dataclasses
import itertools
from collections.abc import Iterator

SHAPES = {"10 x 1024²": (10, 1024), "400 x 32²": (400, 32)}  # name: (weights, side)
# How many arrays of the weights' size a bare step reads and writes, by inner optimizer.
ARRAYS = {"SGD": 3, "momentum": 5, "Adam": 7}
MODELS = ("transformer", "ResNet")


@dataclasses.dataclass(frozen=True)
class Mode:
    """A front end and one way to run it.

    Args:
        module: Module in the package `programs` that makes its programs.
        environments: Environments in which it can run. The Makefile makes them. The first that exists is taken.
        backend: Backend of Keras, if it needs Keras.
        loops: How it runs whole training steps: by `fit`, or in a loop written by hand.
        scales: Whether growth with the number and the size of weights is measured.
        slow_with_many: Whether a step of many weights, or its tracing, takes long.
    """

    module: str
    environments: tuple[str, ...] = (".venv",)
    backend: str | None = None
    loops: tuple[str, ...] = ("by hand",)
    scales: bool = False
    slow_with_many: bool = True


KERAS_LOOPS = ("fit", "by hand")
WITH_PEERS = (".venv-peers", ".venv")
MODES = {
    "Keras, TensorFlow eager": Mode("of_keras", backend="tensorflow"),
    "Keras, TensorFlow graph": Mode("of_keras", backend="tensorflow", loops=KERAS_LOOPS, scales=True),
    "Keras, TensorFlow XLA": Mode("of_keras", backend="tensorflow", loops=KERAS_LOOPS, scales=True),
    "Keras, JAX": Mode("of_keras", backend="jax", loops=KERAS_LOOPS, scales=True),
    "Keras, PyTorch": Mode("of_keras", backend="torch", loops=KERAS_LOOPS, scales=True, slow_with_many=False),
    "tf_keras, graph": Mode("of_tf_keras", loops=KERAS_LOOPS, scales=True),
    "tf.keras 2.15, graph": Mode("of_tf_keras", (".venv-tf215",), loops=KERAS_LOOPS),
    "PyTorch, foreach": Mode("of_torch", WITH_PEERS, scales=True, slow_with_many=False),
    "PyTorch, fused": Mode("of_torch", WITH_PEERS, scales=True, slow_with_many=False),
    "PyTorch, compiled": Mode("of_torch", WITH_PEERS),
    "Optax": Mode("of_optax", backend="jax", scales=True),
}


# Modes of front ends that have momentum on the pseudo-gradient.
OUTER = (
    "PyTorch, foreach",
    "PyTorch, fused",
    "Keras, TensorFlow graph",
    "Keras, TensorFlow XLA",
    "Keras, JAX",
    "Keras, PyTorch",
    "Optax",
)
# The settings of the outer step in these cases. They are MuLoCo's.
OUTER_STEP = {"slow_step_size": 0.7, "slow_momentum": 0.6}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        kind: `"step"`, `"outer"`, `"training"`, `"memory"` or `"scaling"`. `"outer"` is an optimizer step with other
            forms of the outer step: momentum, and slow weights of a wider dtype.
        mode: A key of `MODES`.
        inner: A key of `ARRAYS`.
        weights: Number of weights, for all kinds except `"training"`.
        side: Side of each weight. Weights are square.
        model: One of `MODELS`, for `"training"`.
        loop: One of its mode's `loops`, for `"training"`.
        period: The sync period.
        cycles: Number of cycles to time in each placement.
        placements: How often the programs are made. Times depend on where in memory the weights lie.
        dtype: Dtype of the weights.
    """

    kind: str
    mode: str
    inner: str
    weights: int = 0
    side: int = 0
    model: str = ""
    loop: str = ""
    period: int = 6
    cycles: int = 20
    placements: int = 1
    dtype: str = "float32"

    @property
    def module(self) -> str:
        """The module of its programs."""
        return f"programs.{MODES[self.mode].module}"


def full() -> Iterator[Case]:
    """Yield the cases of the whole suite."""
    large, small = SHAPES.values()
    for mode, inner, period in itertools.product(MODES, ARRAYS, (1, 5, 6, 20)):
        # The aims are for period 6. With this many cycles, nine of ten figures differ by at most 0.05 between two runs.
        cycles, placements = (20, 5) if period == 6 else (max(6, 60 // period), 1)
        yield Case("step", mode, inner, *large, period=period, cycles=cycles, placements=placements)
    for mode, inner in itertools.product(MODES, ARRAYS):
        many = MODES[mode].slow_with_many
        yield Case("step", mode, inner, *small, cycles=50 if many else 20, placements=2 if many else 5)
    # Without TensorFlow's eager mode, which takes up to two seconds for a step of so many weights.
    for mode, inner, period in itertools.product([one for one in MODES if "eager" not in one], ARRAYS, (1, 5, 20)):
        yield Case("step", mode, inner, *small, period=period, cycles=max(6, 20 // period))
    for mode, inner, dtype, period in itertools.product(OUTER, ("SGD", "Adam"), ("float32", "bfloat16"), (6, 30)):
        cycles = 20 if period == 6 else 8
        yield Case("outer", mode, inner, *large, period=period, cycles=cycles, placements=3, dtype=dtype)
    for mode, model, inner in itertools.product(MODES, MODELS, ("SGD", "Adam")):
        for loop in MODES[mode].loops:
            yield Case("training", mode, inner, model=model, loop=loop, cycles=12)
    for mode, period in itertools.product(MODES, (1, 20)):
        yield Case(
            "training", mode, "SGD", model="transformer", loop="by hand", period=period, cycles=max(6, 20 // period)
        )
    for mode in MODES:
        yield Case("memory", mode, "SGD", *large)
    for mode in MODES:
        if MODES[mode].scales:
            for parameters in (10**4, 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8):
                yield Case("scaling", mode, "SGD", 10, round((parameters / 10) ** 0.5), cycles=12)
            # Ten weights of side 32 are among the cases above.
            for weights in (1, 100, 300, 1000, 3000, 10_000):
                yield Case("scaling", mode, "SGD", weights, 32, cycles=12)


def quick() -> Iterator[Case]:
    """Yield one small case for each mode, a training step and a measurement of memory."""
    for mode in MODES:
        yield Case("step", mode, "SGD", 4, 256, cycles=4)
    yield Case("training", "PyTorch, foreach", "Adam", model="transformer", loop="by hand", cycles=4)
    yield Case("memory", "Keras, JAX", "SGD", 10, 1024)
