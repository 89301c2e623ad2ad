"""Training programs in the form that users of TensorFlow Addons have them.

Each program is a function with two arguments. `library` has the Keras of the process and the three optimizers,
TensorFlow Addons' or this package's. `directory` is for its files. A program returns arrays by name.
`record_original.py` records the results with the original.

python tests/test_tf_keras/programs.py DIRECTORY     writes what the original does in them
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorflow as tf

BATCH = 8


def data(seed=20231115, rows=48):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5))
    return x.astype("float32"), np.tanh(x @ rng.normal(size=(5, 1))).astype("float32")


def make_model(keras):
    keras.backend.clear_session()
    model = keras.Sequential(
        [
            keras.Input((5,), name="features"),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="prediction"),
        ]
    )
    rng = np.random.default_rng(20231116)
    model.set_weights([rng.normal(size=weight.shape).astype("float32") for weight in model.get_weights()])
    return model


def fit(model, epochs=3, callbacks=(), **kwargs):
    x, y = data()
    return model.fit(
        x,
        y,
        BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=data(1),
        callbacks=list(callbacks),
        **kwargs,
    )


def weights_of(model):
    return {f"weight/{index}": weight for index, weight in enumerate(model.get_weights())}


def clipped_with_plateau_and_hdf5(library, directory, clips_inside=False):
    """In the original the inner optimizer's `clipnorm` has no effect, so it is recorded with the wrapper's."""
    keras, clipping = library.keras, {"clipnorm": 0.3}
    inner = library.RectifiedAdam(lr=0.02, **(clipping if clips_inside else {}))
    optimizer = library.Lookahead(inner, sync_period=5, slow_step_size=0.5, **({} if clips_inside else clipping))
    model = make_model(keras)
    model.compile(optimizer, "mse")
    callbacks = [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.3, min_lr=1e-4),
        keras.callbacks.ModelCheckpoint(str(Path(directory) / "epoch{epoch}.h5")),
    ]
    rates = [float(rate) for rate in fit(model, 4, callbacks).history["lr"]]
    # The original does not find its own class by the name in the file.
    known = {"RectifiedAdam": library.RectifiedAdam}
    resumed = keras.models.load_model(Path(directory) / "epoch2.h5", custom_objects=known)
    resumed_rates = [float(rate) for rate in fit(resumed, 4, callbacks[:1], initial_epoch=2).history["lr"]]
    return {
        **weights_of(model),
        **{f"resumed/{name}": weight for name, weight in weights_of(resumed).items()},
        "rates": np.array([*rates, *resumed_rates], "float32"),
    }


def under_a_loss_scale_optimizer(library, directory):
    keras, model = library.keras, make_model(library.keras)
    ranger = library.Lookahead(library.RectifiedAdam(0.02, weight_decay=0.01), 4)
    optimizer = keras.mixed_precision.LossScaleOptimizer(ranger, initial_scale=128.0, dynamic_growth_steps=5)
    loss_function, (x, y) = keras.losses.MeanSquaredError(), data()

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
            scaled = optimizer.get_scaled_loss(loss)
        gradients = optimizer.get_unscaled_gradients(tape.gradient(scaled, model.trainable_variables))
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    for row in range(0, 2 * len(x), BATCH):
        row %= len(x)
        step(tf.constant(x[row : row + BATCH]), tf.constant(y[row : row + BATCH]))
    return {**weights_of(model), "scale": np.float32(optimizer.loss_scale)}


def with_warm_up(library, directory):
    model = make_model(library.keras)
    inner = library.RectifiedAdam(
        learning_rate=0.05, total_steps=16, warmup_proportion=0.25, min_lr=0.001, beta_2=0.98, weight_decay=0.01
    )
    model.compile(library.Lookahead(inner, sync_period=6, slow_step_size=0.5), "mse", metrics=["mae"])
    fit(model)
    return weights_of(model)


def in_a_custom_loop(library, directory):
    model, (x, y) = make_model(library.keras), data()
    optimizer = library.Lookahead(library.RectifiedAdam(0.03))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - model(x)))
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 1.0)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    for row in range(0, len(x), BATCH):
        step(tf.constant(x[row : row + BATCH]), tf.constant(y[row : row + BATCH]))
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    path = checkpoint.save(str(Path(directory) / "loop"))
    compiled = tf.function(step)
    for row in range(0, len(x), BATCH):
        compiled(tf.constant(x[row : row + BATCH]), tf.constant(y[row : row + BATCH]))
    weights = weights_of(model)
    checkpoint.restore(path)
    step(tf.constant(x), tf.constant(y))
    return {**weights, **{f"restored/{name}": weight for name, weight in weights_of(model).items()}}


def chosen_by_a_config_file(library, directory):
    file = Path(directory) / "training.json"
    file.write_text(
        json.dumps(
            {
                "class_name": "Addons>Lookahead",
                "config": {
                    "optimizer": {
                        "class_name": "Addons>RectifiedAdam",
                        "config": {"learning_rate": 0.02, "weight_decay": 0.05, "amsgrad": True},
                    },
                    "sync_period": 3,
                },
            }
        )
    )
    model = make_model(library.keras)
    model.compile(library.keras.optimizers.get(json.loads(file.read_text())), "mse")
    fit(model)
    return weights_of(model)


def adamw_with_clipvalue_and_a_schedule(library, directory):
    schedules = library.keras.optimizers.schedules
    model = make_model(library.keras)
    optimizer = library.AdamW(
        learning_rate=schedules.PolynomialDecay(0.05, 15, 0.001),
        weight_decay=schedules.PolynomialDecay(0.01, 15, 0.0002),
        exclude_from_weight_decay=["bias"],
        clipvalue=0.1,
    )
    model.compile(optimizer, "mse")
    fit(model)
    return weights_of(model)


def adamw_in_lookahead(library, directory):
    schedules = library.keras.optimizers.schedules
    model = make_model(library.keras)
    inner = library.AdamW(1e-2, schedules.ExponentialDecay(0.05, 6, 0.5))
    model.compile(library.Lookahead(inner, 5, clipvalue=0.1), "mse")
    fit(model)
    return weights_of(model)


PROGRAMS = {
    program.__name__: program
    for program in (
        clipped_with_plateau_and_hdf5,
        under_a_loss_scale_optimizer,
        with_warm_up,
        in_a_custom_loop,
        chosen_by_a_config_file,
        adamw_with_clipvalue_and_a_schedule,
        adamw_in_lookahead,
    )
}


def write_those_of_the_original(directory):
    """Run all programs with TensorFlow Addons, and write the results of each into a file of its name."""
    import tensorflow_addons as tfa

    names = "Lookahead", "RectifiedAdam", "AdamW"
    library = SimpleNamespace(keras=tf.keras, **{name: getattr(tfa.optimizers, name) for name in names})
    for name, program in PROGRAMS.items():
        with tempfile.TemporaryDirectory() as files:
            np.savez_compressed(Path(directory) / f"{name}.npz", **program(library, files))


if __name__ == "__main__":
    write_those_of_the_original(sys.argv[1])
