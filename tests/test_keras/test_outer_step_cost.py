"""Costs of slow momentum that must not appear: copies, reads, waits, compilations. And the cost of no momentum."""

import re

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.test_keras.helpers import BACKEND

SHAPE, COUNT = (64, 64), 3
BYTES = np.prod(SHAPE) * 4
MOMENTUM = {"slow_momentum": 0.9}
WIDE = {"slow_momentum": 0.9, "slow_dtype": "float32"}


def wrapped(sync_period=6, dtype="float32", name=None, **kwargs):
    # Names for what Keras would number.
    variables = [keras.Variable(np.full(SHAPE, 0.5), dtype=dtype, name=f"weight_{one}") for one in range(COUNT)]
    inner = keras.optimizers.SGD(0.1, momentum=0.9, name="inner")
    optimizer = Lookahead(inner, sync_period, **kwargs)
    optimizer.build(variables)
    return optimizer, variables, [keras.ops.ones(SHAPE, dtype) for _ in variables]


def own_variables(optimizer):
    return optimizer.variables[: len(optimizer.variables) - len(optimizer.inner_optimizer.variables)]


def test_state_is_two_copies_of_the_weights_and_three_numbers():
    for dtype, outer in (("float32", MOMENTUM), ("bfloat16", WIDE)):
        own = own_variables(wrapped(dtype=dtype, **outer)[0])
        assert sum(np.prod(one.shape) for one in own) == 3 + 2 * COUNT * np.prod(SHAPE)


def test_without_momentum_there_are_the_variables_of_before():
    names = []
    for outer in ({}, {"slow_momentum": 0.0, "slow_nesterov": False, "slow_dtype": None}):
        optimizer, _, _ = wrapped(**outer)
        names.append([(one.name, tuple(one.shape), one.dtype) for one in optimizer.variables])
        assert len(own_variables(optimizer)) == 1 + COUNT + 2
        assert set(optimizer._own_variables()) == {"captured", *(f"slow_{index}" for index in range(COUNT))}
    assert names[0] == names[1]


# XLA of the oldest supported releases computes bfloat16 in float32 on a CPU, with copies.
IS_OLD = keras.__version__.startswith("3.10.")
with_narrow_weights = pytest.mark.parametrize(
    ("dtype", "outer"),
    [
        ("float32", MOMENTUM),
        pytest.param("bfloat16", WIDE, marks=pytest.mark.skipif(IS_OLD, reason="XLA copies bfloat16")),
    ],
)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
class TestJAX:
    def lower(self, optimizer, variables, gradients):
        import jax

        weights = [variable.value for variable in variables]
        state = [variable.value for variable in optimizer.variables]
        step = jax.jit(
            lambda weights, state, gradients: optimizer.stateless_apply(state, gradients, weights),
            donate_argnums=(0, 1),
        )
        return step.lower(weights, state, gradients)

    def test_all_state_is_updated_in_place_without_temporaries(self):
        compiled = self.lower(*wrapped(**MOMENTUM)).compile()
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < BYTES
        # Weights, slow weights, slow momentum and momentum, all donated.
        assert memory.alias_size_in_bytes >= 4 * COUNT * BYTES

    @pytest.mark.skipif(IS_OLD, reason="XLA copies bfloat16")
    def test_wide_slow_weights_and_momentum_are_updated_in_place(self):
        memory = self.lower(*wrapped(dtype="bfloat16", **WIDE)).compile().memory_analysis()
        assert memory.temp_size_in_bytes < BYTES
        # Two of the four are in bfloat16.
        assert memory.alias_size_in_bytes >= (2 + 0.5 + 0.5) * COUNT * BYTES

    @with_narrow_weights
    def test_step_outside_the_conditionals_neither_copies_weights_nor_touches_slow_weights_or_momentum(
        self, dtype, outer
    ):
        optimizer, variables, gradients = wrapped(dtype=dtype, **outer)
        text = self.lower(optimizer, variables, gradients).compile().as_text()
        entry = text[text.index("\nENTRY ") :]
        assert re.findall(r"(?:f32|bf16)\[64,64\]\S* copy\(", entry) == []
        # After the weights and `captured`: three slow weights, then three momenta.
        numbers = "|".join(str(COUNT + 1 + index) for index in range(2 * COUNT))
        parameters = set(re.findall(rf"(%\S+) = f32\[64,64\]\S* parameter\((?:{numbers})\)", entry))
        assert len(parameters) == 2 * COUNT
        for name in parameters:
            users = re.findall(rf" (\S+)\([^)]*{re.escape(name)}[,)]", entry)
            assert users, name
            assert set(users) <= {"tuple", "conditional"}, users

    def test_donated_buffers_are_gone_and_no_two_results_share_one(self):
        import jax

        optimizer, variables, gradients = wrapped(sync_period=2, **MOMENTUM)
        weights = [variable.value for variable in variables]
        state = [variable.value for variable in optimizer.variables]
        apply = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        for _ in range(5):
            old = weights + state
            weights, state = apply(state, gradients, weights)
            assert all(array.is_deleted() for array in old if array.shape == SHAPE)
            pointers = [array.unsafe_buffer_pointer() for array in weights + state]
            assert len(set(pointers)) == len(pointers)

    @pytest.mark.parametrize("step_size", [0.5, lambda syncs: 0.5 / (1.0 + keras.ops.cast(syncs, "float32"))])
    def test_steps_do_not_recompile(self, step_size):
        import jax

        optimizer, variables, gradients = wrapped(sync_period=2, slow_step_size=step_size, **MOMENTUM)
        traces = []

        def step(state, weights):
            traces.append(1)
            return optimizer.stateless_apply(state, gradients, weights)

        step = jax.jit(step)
        weights = [variable.value for variable in variables]
        state = [variable.value for variable in optimizer.variables]
        for _ in range(6):
            weights, state = step(state, weights)
        assert len(traces) == 1

    def test_without_momentum_the_step_is_the_program_of_the_default(self):
        default = self.lower(*wrapped()).as_text()
        assert self.lower(*wrapped(slow_momentum=0.0, slow_nesterov=False)).as_text() == default
        assert self.lower(*wrapped(**MOMENTUM)).as_text() != default


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow")
class TestTensorFlow:
    @with_narrow_weights
    def test_xla_program_has_no_conditional_and_does_not_copy_weights(self, dtype, outer):
        import tensorflow as tf

        optimizer, variables, gradients = wrapped(dtype=dtype, **outer)
        step = tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=True)
        step()
        text = step.experimental_get_compiler_ir()(stage="optimized_hlo")
        assert " conditional(" not in text
        entry = text[text.index("\nENTRY ") :]
        assert " while(" in entry
        assert re.findall(r"(?:f32|bf16)\[64,64\]\S* copy\(", entry) == []

    @pytest.mark.parametrize("step_size", [0.5, lambda syncs: 0.5 / (1.0 + keras.ops.cast(syncs, "float32"))])
    def test_steps_do_not_retrace(self, step_size):
        import tensorflow as tf

        optimizer, variables, gradients = wrapped(sync_period=2, slow_step_size=step_size, **MOMENTUM)
        step = tf.function(lambda: optimizer.apply(gradients, variables))
        for _ in range(6):
            step()
        optimizer.sync_period = 3
        step()
        assert step.experimental_get_tracing_count() == 1

    @pytest.mark.parametrize(("dtype", "outer"), [("float32", MOMENTUM), ("bfloat16", WIDE)])
    def test_slow_weights_and_momentum_are_read_only_inside_the_conditional_part(self, dtype, outer):
        import tensorflow as tf

        optimizer, variables, gradients = wrapped(dtype=dtype, **outer)
        state = [*optimizer.slow_variables, *(optimizer.get_slot(one, "slow_momentum") for one in variables)]
        step = tf.function(lambda: optimizer.apply(gradients, variables)).get_concrete_function()
        captured = {
            internal.name
            for external, internal in step.graph.captures
            if any(external is one.value.handle for one in state)
        }
        assert len(captured) == len(state) == 2 * COUNT
        users = [
            operation
            for operation in step.graph.get_operations()
            if captured & {tensor.name for tensor in operation.inputs}
        ]
        assert {one.type for one in users} == {"If"}

    def test_without_momentum_the_step_is_the_program_of_the_default(self):
        import tensorflow as tf

        def operations(**outer):
            optimizer, variables, gradients = wrapped(**outer)
            step = tf.function(lambda: optimizer.apply(gradients, variables)).get_concrete_function()
            definition = step.graph.as_graph_def()
            # Functions have no order.
            inner = sorted(str([node.op for node in function.node_def]) for function in definition.library.function)
            return [node.op for node in definition.node], inner

        assert operations(slow_momentum=0.0, slow_nesterov=False) == operations()
        assert operations(**MOMENTUM) != operations()


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch")
class TestTorch:
    def test_own_counts_are_not_read_from_the_device(self, monkeypatch):
        import torch

        optimizer, variables, gradients = wrapped(sync_period=2, **MOMENTUM)
        own = {id(one.value) for one in own_variables(optimizer) if one.shape == ()}
        own.add(id(optimizer._iterations.value))
        assert len(own) == 4
        reads = []
        for method in ("__int__", "__bool__", "item", "tolist", "__index__"):
            read = getattr(torch.Tensor, method)
            monkeypatch.setattr(
                torch.Tensor, method, lambda self, read=read: reads.append(id(self) in own) or read(self)
            )
        for _ in range(2):
            optimizer.apply(gradients, variables)
        first = sum(reads)
        for _ in range(6):
            optimizer.apply(gradients, variables)
        assert sum(reads) == first <= 6
        assert int(optimizer.iterations) == 8

    def allocated(self, optimizer, variables, gradients):
        """Return the number of bytes that a `sync` allocates."""
        import torch

        for _ in range(3):
            optimizer.apply(gradients, variables)
        before = keras.ops.convert_to_numpy(optimizer.get_slot(variables[0], "slow_momentum")).copy()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.sync()
        after = keras.ops.convert_to_numpy(optimizer.get_slot(variables[0], "slow_momentum"))
        # It did something.
        assert (before != after).all()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    @pytest.mark.parametrize("slow_nesterov", [True, False])
    def test_sync_allocates_nothing(self, slow_nesterov):
        assert self.allocated(*wrapped(sync_period=2, slow_nesterov=slow_nesterov, **MOMENTUM)) < BYTES

    def test_without_momentum_a_sync_is_one_interpolation_and_one_copy(self):
        import torch

        optimizer, variables, gradients = wrapped(sync_period=2, slow_momentum=0.0)
        for _ in range(3):
            optimizer.apply(gradients, variables)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.sync()
        names = {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::_foreach")}
        assert names == {"aten::_foreach_lerp_": 1, "aten::_foreach_copy_": 1}
