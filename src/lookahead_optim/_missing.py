"""An error message that says which extra of this package installs a missing framework."""

import contextlib
from collections.abc import Iterator

__all__ = ["explain_missing"]

BACKENDS = ("tensorflow", "jax", "torch")


@contextlib.contextmanager
def explain_missing(module: str, extra: str, *packages: str) -> Iterator[None]:
    """Return a context manager for imports, which explains the `ModuleNotFoundError` of a missing framework.

    Args:
        module: Name of the module that does the imports.
        extra: Name of the extra that installs the packages.
        *packages: Names of the packages that the module needs.

    Raises:
        ModuleNotFoundError: if a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in packages:
            raise ModuleNotFoundError(
                f"`{module}` needs the package `{error.name}`, which is not installed: "
                f"pip install 'lookahead-optim[{extra}]'",
                name=error.name,
            ) from error
        if "keras" in packages and error.name in BACKENDS:
            raise ModuleNotFoundError(
                f"Keras looks for its backend `{error.name}`, which is not installed. Install it, or set the "
                f"environment variable KERAS_BACKEND to the backend that is installed, one of {', '.join(BACKENDS)}, "
                "before Keras is imported",
                name=error.name,
            ) from error
        raise
