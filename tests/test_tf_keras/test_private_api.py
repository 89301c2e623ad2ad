"""Private parts of TensorFlow and Keras 2 that the package uses: a release that changes a part is named here."""

import inspect
import operator

import pytest
import tensorflow as tf

from lookahead_optim.tf_keras._keras import keras

Optimizer = keras.optimizers.legacy.Optimizer
# Parts of TensorFlow, for Keras 3 too.
MODULES = [
    # No public function says whether XLA compiles the graph under construction.
    "__internal__.get_enclosing_xla_context",
    # The public `ReplicaContext.merge_call` is an error where XLA compiles the step of each GPU for itself.
    "__internal__.distribute.interim.maybe_merge_call",
]
# Parts of legacy optimizers. A wrapper of a legacy optimizer must override or call the methods that the base class
# itself uses.
METHODS = {
    # One variable's step, and how often the gradients are transformed before.
    "_resource_apply_dense": ("grad", "handle", "apply_state"),
    "_resource_apply_sparse": ("grad", "handle", "indices", "apply_state"),
    "_resource_apply_sparse_duplicate_indices": ("grad", "handle", "indices"),
    "_compute_gradients": ("loss", "var_list"),
    "_transform_gradients": ("grads_and_vars",),
    "_transform_unaggregated_gradients": ("grads_and_vars",),
    "_aggregate_gradients": ("grads_and_vars",),
    # State that is made on first use.
    "_create_all_weights": ("var_list",),
    "_create_hypers": (),
    "_create_slots": ("var_list",),
    "_prepare_local": ("var_device", "var_dtype", "apply_state"),
    "_distribution_strategy_scope": (),
    # Settings.
    "_get_hyper": ("name", "dtype"),
    "_set_hyper": ("name", "value"),
    "_serialize_hyperparameter": ("hyperparameter_name",),
    # Checkpoints.
    "_create_or_restore_slot_variable": ("slot_variable_position", "slot_name", "variable"),
    "_lookup_dependency": ("name", "cached_dependencies"),
    "_track_trackable": ("trackable", "name", "overwrite"),
    "_handle_deferred_dependencies": ("name", "trackable"),
    "_trackable_children": ("save_type",),
}
ATTRIBUTES = [
    "_iterations",
    "_weights",
    "_slots",
    "_hyper",
    "_name",
    "_clipnorm",
    "_clipvalue",
    "_global_clipnorm",
    "_initial_decay",
    "_dense_apply_args",
    "_sparse_apply_args",
]


def message(name, expected="any more"):
    versions = f"TensorFlow {tf.__version__} with Keras {keras.__version__}"
    return f"{versions} has no {name} {expected}, which `lookahead_optim` uses."


@pytest.mark.parametrize("name", MODULES)
def test_what_is_used_of_tensorflow_is_there(name):
    try:
        operator.attrgetter(name)(tf)
    except AttributeError:
        pytest.fail(message(f"`tf.{name}`"))


@pytest.mark.parametrize("name", METHODS)
def test_legacy_optimizers_have_the_methods_that_are_used(name):
    method = getattr(Optimizer, name, None)
    assert method is not None, message(f"`{Optimizer.__name__}.{name}`")
    parameters = inspect.signature(method).parameters
    has_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument in METHODS[name]:
        assert has_any or argument in parameters, message(f"`{Optimizer.__name__}.{name}`", f"with `{argument}`")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_legacy_optimizers_have_the_attributes_that_are_used(name):
    assert hasattr(keras.optimizers.legacy.SGD(0.1), name), message(f"`{Optimizer.__name__}.{name}`")


def test_a_legacy_optimizer_keeps_its_count_in_iterations_and_its_slots_in_weights():
    optimizer, variable = keras.optimizers.legacy.SGD(0.1, momentum=0.9), tf.Variable(1.0)
    optimizer.apply_gradients([(tf.constant(1.0), variable)])
    (slots,) = optimizer._slots.values()
    assert optimizer._weights[0] is optimizer._iterations, message("count first in `_weights`")
    assert optimizer._weights[1] is slots["momentum"], message("slots in `_weights` and `_slots`")


def test_a_loss_scaler_marks_what_it_wraps():
    optimizer = keras.optimizers.legacy.SGD(0.1)
    keras.mixed_precision.LossScaleOptimizer(optimizer)
    marked = getattr(optimizer, "_is_wrapped_by_loss_scale_optimizer", False)
    assert marked, message("`_is_wrapped_by_loss_scale_optimizer`")


def test_a_variable_says_in_which_strategy_it_was_made():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert getattr(variable, "_distribute_strategy", None) is strategy, message("`Variable._distribute_strategy`")


def test_a_position_in_a_checkpoint_tells_one_restoration_from_another():
    from tensorflow.python.checkpoint.restore import CheckpointPosition

    assert hasattr(CheckpointPosition, "restore_uid"), message("`CheckpointPosition.restore_uid`")


def test_history_is_the_last_callback_of_a_fit_and_an_attribute_of_its_model():
    class Last(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # It records the epoch in its own `on_epoch_end`.
            assert self.model.history.epoch == [], message("`History` as the last callback")

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert model.fit(tf.ones((1, 1)), tf.ones((1, 1)), callbacks=[Last()], verbose=0).epoch == [0]
