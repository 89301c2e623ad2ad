"""Lookahead (Zhang et al., 2019), one native implementation per framework.

Import the front end of your framework, for example `lookahead_optim.keras`; this module imports none.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
