"""For Keras 2 and Keras 3 on TensorFlow: the size of a graph, and training loops written by hand."""

import tensorflow as tf

import models
from timing import Program


def operations(traced):
    """Return the number of operations in a TensorFlow graph and in its functions, such as the bodies of loops."""
    graph = traced.get_concrete_function().graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


def loop_program(keras, case, optimizer, options):
    """Return a program that trains in a loop written by hand.

    Args:
        keras: The Keras to use, 2 or 3.
        case: The case.
        optimizer: The optimizer.
        options: Options of `tf.function`, or None for eager steps.
    """
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
