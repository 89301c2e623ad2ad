import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: on small tensors threads mostly wait for each other. Child processes also have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
