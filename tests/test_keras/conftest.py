import keras
import pytest


@pytest.fixture(autouse=True)
def _clean_keras():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)
