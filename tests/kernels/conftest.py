"""Fixtures of the kernels' tests."""

import random

import pytest


@pytest.fixture
def seed() -> int:
    """A new one each run; pytest prints it where a test fails."""
    value = random.randrange(2**31)
    print(f"seed {value}")
    return value
