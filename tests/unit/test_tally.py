"""Numbers that the kernel should show, and what a difference of them says."""

from vipd.backends.tally import Tally
from vipd.proxy.names import Family

NAT = (Family.IPV4, "nat")


def observed() -> Tally:
    tally = Tally()
    tally.observed({NAT: {"VIPD-A": 2, "VIPD-B": 0}}, {"VIPD-SET": 3})
    return tally


def test_what_is_as_it_was_told_is_right() -> None:
    tally = observed()
    tally.wrote(NAT, {"VIPD-A": 5, "VIPD-C": 1}, ["VIPD-B"])
    tally.added("VIPD-SET", ["1", "2", "2"], ["1"])
    tally.deleted("VIPD-SET", ["3", "4"], [])
    assert tally.wrong_chains(NAT, {"VIPD-A": 5, "VIPD-C": 1, "DOCKER": 7}) == []
    assert tally.wrong_sets(["VIPD-SET"], {"VIPD-SET": 2, "others": 9}) == []


def test_what_differs_is_named() -> None:
    tally = observed()
    assert tally.wrong_chains(NAT, {"VIPD-A": 1}) == [
        "chain VIPD-A of IPv4 nat: 1 rules, not 2",
        "chain VIPD-B of IPv4 nat: is not there, not 0",
    ]
    assert tally.wrong_sets(["VIPD-SET"], {}) == ["set VIPD-SET: is not there, not 3"]


def test_what_is_not_known_is_taken_over() -> None:
    tally = observed()
    tally.doubt(NAT)
    tally.doubt_set("VIPD-SET")
    tally.added("VIPD-SET", ["1"], [])
    assert tally.wrong_chains(NAT, {"VIPD-A": 1}) == []
    assert tally.wrong_sets(["VIPD-SET"], {"VIPD-SET": 8}) == []
    assert tally.wrong_chains(NAT, {}) == ["chain VIPD-A of IPv4 nat: is not there, not 1"]
    assert tally.wrong_sets(["VIPD-SET"], {"VIPD-SET": 7}) == ["set VIPD-SET: 7 entries, not 8"]


def test_a_set_that_was_made_is_empty_and_one_that_was_there_stays() -> None:
    tally = observed()
    tally.made_set("VIPD-NEW")
    tally.made_set("VIPD-SET")
    assert tally.wrong_sets(["VIPD-NEW", "VIPD-SET"], {"VIPD-NEW": 0, "VIPD-SET": 3}) == []
