"""The size of TensorFlow's graphs."""


def operations(traced):
    """Return the operations in a TensorFlow graph, those of its functions (the bodies of loops, say) included."""
    graph = traced.get_concrete_function().graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)
