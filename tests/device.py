"""The device of the tests that are marked `gpu` and of the conformance suite: `LOOKAHEAD_DEVICE`, or the CPU."""

import os

DEVICE = os.environ.get("LOOKAHEAD_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
