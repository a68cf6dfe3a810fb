"""What the tests in and of the virtual machine share: its kernel, or why there is none."""

import os

import pytest
from tests.vm import machine
from tests.vm.kernel import Kernel, MissingError

REQUIRED = ("VIPD_REQUIRE_VM",)
"""Variables that make a failure of what would be a skip."""


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    try:
        return machine.available()
    except MissingError as missing:
        reason = f"no virtual machine here: {missing}"
    if any(os.environ.get(one) for one in REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)
