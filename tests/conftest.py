"""What all tests share: one thread, a fixed seed, and where and how precisely they compute.

DUALNN_TEST_DEVICE (default cpu) and DUALNN_TEST_DTYPE (default float64) move the tests that ask for the fixtures
`device` and `dtype`.
"""

import os

import pytest
import torch

# Two workers with two threads each would wait for one another, and a sum split otherwise rounds otherwise.
torch.set_num_threads(1)

DEVICE = torch.device(os.environ.get("DUALNN_TEST_DEVICE", "cpu"))
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def pytest_configure() -> None:
    name = os.environ.get("DUALNN_TEST_DTYPE", "float64")
    if name not in DTYPES:
        raise pytest.UsageError(f"DUALNN_TEST_DTYPE={name!r}: choose one of {', '.join(DTYPES)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, alone or in a crowd."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the tests compute."""
    return DEVICE


@pytest.fixture
def dtype() -> torch.dtype:
    """How precisely the tests compute."""
    return DTYPES[os.environ.get("DUALNN_TEST_DTYPE", "float64")]
