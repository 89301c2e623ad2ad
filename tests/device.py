"""The device of the conformance suite and of the tests with the mark `gpu`: `LOOKAHEAD_DEVICE`, or the CPU."""

import os

DEVICE = os.environ.get("LOOKAHEAD_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
