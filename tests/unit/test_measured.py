"""Distributions count as Prometheus's histograms do."""

from vipd.proxy.measured import Distribution


def test_a_bound_belongs_to_its_range() -> None:
    took = Distribution((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 4.1, 100):
        took.observe(value)
    assert took.counts == [2, 1, 1, 2]
    assert took.total == 111.1
