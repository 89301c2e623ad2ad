"""Designs in Keras 3: those for its backend."""

import importlib

import keras

from programs.of_keras import step_program, versions

__all__ = ["optimizers", "step_program", "versions"]

optimizers = importlib.import_module(f"designs.keras_on_{keras.config.backend()}").optimizers
