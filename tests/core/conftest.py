import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The networks and inputs of a test are the same in whatever order tests run."""
    torch.manual_seed(0)
