import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """On small tensors threads mostly wait for each other; and in child processes there is one too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
