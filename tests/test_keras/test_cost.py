"""Costs that must not appear: copies, reads, waits and compilations that are not needed."""

import keras
import numpy as np
import pytest

from lookahead_optim.keras import Lookahead
from tests.test_keras.helpers import BACKEND, mlp

SHAPE = (64, 64)


def wrapped(count=3, **kwargs):
    variables = [keras.Variable(np.full(SHAPE, 0.5, "float32")) for _ in range(count)]
    optimizer = Lookahead(keras.optimizers.SGD(0.1, momentum=0.9), **kwargs)
    optimizer.build(variables)
    gradients = [keras.ops.ones(SHAPE) for _ in variables]
    return optimizer, variables, gradients


def test_state_is_one_copy_of_the_weights_and_three_numbers():
    optimizer, variables, _ = wrapped()
    own = optimizer.variables[: len(optimizer.variables) - len(optimizer.inner_optimizer.variables)]
    assert sum(np.prod(variable.shape) for variable in own) == 3 + sum(np.prod(one.shape) for one in variables)


def test_own_state_is_saved_once(tmp_path):
    sizes = {}
    for name, optimizer in {"bare": keras.optimizers.SGD(), "wrapped": Lookahead(keras.optimizers.SGD())}.items():
        model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
        model.compile(optimizer, loss="mse")
        optimizer.build(model.trainable_variables)
        model.save_weights(tmp_path / f"{name}.weights.h5")
        sizes[name] = (tmp_path / f"{name}.weights.h5").stat().st_size
    assert sizes["wrapped"] < 2.2 * sizes["bare"]


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
class TestJAX:
    def compile(self, optimizer, variables, gradients):
        import jax

        weights = [variable.value for variable in variables]
        state = [variable.value for variable in optimizer.variables]
        # JAX gives donated buffers to outputs in order. A step that returned its arguments in another order would
        # exchange them by copying.
        step = jax.jit(
            lambda weights, state, gradients: optimizer.stateless_apply(state, gradients, weights),
            donate_argnums=(0, 1),
        )
        return step.lower(weights, state, gradients).compile()

    def test_all_state_is_updated_in_place_without_temporaries(self):
        optimizer, variables, gradients = wrapped()
        compiled = self.compile(optimizer, variables, gradients)
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < np.prod(SHAPE) * 4
        # Weights, slow weights, momenta, all donated.
        assert memory.alias_size_in_bytes >= 3 * len(variables) * np.prod(SHAPE) * 4

    def test_step_outside_the_conditionals_neither_copies_weights_nor_touches_slow_ones(self):
        import re

        optimizer, variables, gradients = wrapped()
        text = self.compile(optimizer, variables, gradients).as_text()
        entry = text[text.index("\nENTRY ") :]
        assert re.findall(r"f32\[64,64\]\S* copy\(", entry) == []
        slow_parameters = set(re.findall(r"(%\S+) = f32\[64,64\]\S* parameter\((?:4|5|6)\)", entry))
        assert len(slow_parameters) == len(variables)
        for name in slow_parameters:
            users = re.findall(rf" (\S+)\([^)]*{re.escape(name)}[,)]", entry)
            assert set(users) <= {"tuple", "conditional"}, users

    def test_donated_buffers_are_gone_and_no_two_results_share_one(self):
        import jax

        optimizer, variables, gradients = wrapped(sync_period=2)
        weights = [variable.value for variable in variables]
        state = [variable.value for variable in optimizer.variables]
        apply = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        for _ in range(5):
            old = weights + state
            weights, state = apply(state, gradients, weights)
            assert all(array.is_deleted() for array in old if array.shape == SHAPE)
            pointers = [array.unsafe_buffer_pointer() for array in weights + state]
            assert len(set(pointers)) == len(pointers)

    def test_steps_do_not_recompile(self):
        import jax

        optimizer, variables, gradients = wrapped(sync_period=2)
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


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow")
class TestTensorFlow:
    def test_xla_program_has_no_conditional_and_does_not_copy_weights(self):
        import re

        import tensorflow as tf

        optimizer, variables, gradients = wrapped()
        step = tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=True)
        step()
        text = step.experimental_get_compiler_ir()(stage="optimized_hlo")
        assert " conditional(" not in text
        entry = text[text.index("\nENTRY ") :]
        assert " while(" in entry
        assert re.findall(r"f32\[64,64\]\S* copy\(", entry) == []

    def test_steps_do_not_retrace(self):
        import tensorflow as tf

        optimizer, variables, gradients = wrapped(sync_period=2)
        step = tf.function(lambda: optimizer.apply(gradients, variables))
        for _ in range(6):
            step()
        assert step.experimental_get_tracing_count() == 1

    def test_slow_weights_are_read_only_inside_the_conditional_part(self):
        import tensorflow as tf

        optimizer, variables, gradients = wrapped()
        step = tf.function(lambda: optimizer.apply(gradients, variables)).get_concrete_function()
        captured = {
            internal.name
            for external, internal in step.graph.captures
            if any(external is slow.value.handle for slow in optimizer.slow_variables)
        }
        assert len(captured) == len(variables)
        users = [
            operation
            for operation in step.graph.get_operations()
            if captured & {tensor.name for tensor in operation.inputs}
        ]
        assert {one.type for one in users} == {"If"}
        # With this operation TensorFlow takes a conditional apart, and passes every weight through its parts at each
        # step.
        assert not any("_lower_using_switch_merge" in one.node_def.attr for one in users)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch")
class TestTorch:
    def test_own_counts_are_not_read_from_the_device(self, monkeypatch):
        import torch

        optimizer, variables, gradients = wrapped(sync_period=2)
        own = {id(optimizer._iterations.value), id(optimizer._captured.value)}
        reads = []
        for method in ("__int__", "__bool__", "item", "tolist", "__index__"):
            read = getattr(torch.Tensor, method)
            monkeypatch.setattr(
                torch.Tensor, method, lambda self, read=read: reads.append(id(self) in own) or read(self)
            )
        optimizer.apply(gradients, variables)
        first = sum(reads)
        for _ in range(5):
            optimizer.apply(gradients, variables)
        assert sum(reads) == first <= 4
        assert int(optimizer.iterations) == 6

    def test_weights_are_asked_once_after_a_capture_whether_they_need_care(self, monkeypatch):
        from lookahead_optim.keras import _on_torch

        optimizer, variables, gradients = wrapped(sync_period=2)
        asked, is_large = [], _on_torch.is_large
        monkeypatch.setattr(_on_torch, "is_large", lambda weights: asked.append(len(weights)) or is_large(weights))
        for _ in range(8):
            optimizer.apply(gradients, variables)
        assert asked == [len(variables)]
        optimizer.reset_slow_weights()
        for _ in range(4):
            optimizer.apply(gradients, variables)
        assert asked == [len(variables)] * 2

    def test_step_count_assigned_by_others_is_noticed(self):
        optimizer, variables, gradients = wrapped(sync_period=4)
        optimizer.apply(gradients, variables)
        optimizer.iterations.assign(3)
        optimizer.apply(gradients, variables)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(optimizer.slow_variables[0].value),
            keras.ops.convert_to_numpy(variables[0].value),
        )

    def test_sync_allocates_nothing(self):
        import torch

        optimizer, variables, gradients = wrapped(sync_period=1)
        optimizer.apply(gradients, variables)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.sync()
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
        assert allocated < np.prod(SHAPE) * 4

    def test_compiled_step_does_not_recompile_every_step(self):
        import torch

        model = mlp()
        optimizer = Lookahead(keras.optimizers.SGD(0.1), sync_period=2)
        optimizer.build(model.trainable_variables)
        gradients = [torch.ones(tuple(variable.shape)) for variable in model.trainable_variables]
        torch._dynamo.reset()
        step = torch.compile(lambda: optimizer.apply(gradients), backend="eager")
        for _ in range(4):
            step()
        torch._dynamo.utils.counters.clear()
        for _ in range(6):
            step()
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0
        assert int(optimizer.iterations) == 10
