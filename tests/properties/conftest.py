"""Hypothesis for this folder: the same examples in every run, and no deadline.

`VIPD_EXPLORE=1000 pytest tests/properties` searches that many random examples instead.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from vipd.backends.slots import maglev

EXPLORE = int(os.environ.get("VIPD_EXPLORE", "0"))

settings.register_profile(
    "vipd",
    deadline=None,
    derandomize=not EXPLORE,
    database=None,
    max_examples=EXPLORE or 60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("vipd")


@pytest.fixture(scope="module")
def small_maglev() -> Iterator[None]:
    """Make Maglev tables of 31 slots, so that every slot of one can be tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vipd.backends.slots.MAGLEV_SIZES", (31,))
        maglev.cache_clear()
        yield
    maglev.cache_clear()
