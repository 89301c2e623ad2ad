"""Lookahead (Zhang et al., 2019), with a native implementation for each framework.

Import the front end of your framework, for example `lookahead_optim.keras`. This module imports none.
"""

import typing

__all__ = ["__version__"]

__version__ = "0.1.0"

# Hidden from type checkers, which know by themselves that the name does not exist.
if not typing.TYPE_CHECKING:

    def __getattr__(name):
        if name in ("Lookahead", "lookahead"):
            # Python would turn an `AttributeError` into an `ImportError` without this text.
            raise ImportError(
                "`lookahead_optim` has a Lookahead for each framework, and does not choose one. Import it from your "
                "framework's module: `lookahead_optim.keras`, `lookahead_optim.tf_keras` (Keras 2) and "
                "`lookahead_optim.torch` have `Lookahead`, `lookahead_optim.optax` has `lookahead`",
                name=__name__,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
