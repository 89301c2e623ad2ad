"""What programs of Keras 2 and 3 on TensorFlow share: the size of graphs, and loops by hand."""

import tensorflow as tf

import models
from timing import Program


def operations(traced):
    """Return the operations in a TensorFlow graph, those of its functions (the bodies of loops, say) included."""
    graph = traced.get_concrete_function().graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


def loop_program(keras, case, optimizer, options):
    """Return the program of a training loop by hand, with options of `tf.function`, or None for eager steps."""
    model, x, y = models.of_keras(keras, case.model)
    x, y = tf.constant(x), tf.constant(y)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step():
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    def wait():
        return tf.convert_to_tensor(model.trainable_variables[0]).numpy()

    if hasattr(optimizer, "build"):
        optimizer.build(model.trainable_variables)
    return Program(step if options is None else tf.function(step, **options), wait)
