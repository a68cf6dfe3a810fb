"""What IPVS should have of ours, in numbers, and what a count of it says."""

from ipaddress import ip_address

from vipd.backends.ipvs.messages import Counted
from vipd.backends.ipvs.objects import ADD, DELETE, SET, Destination, Operation, Service, Thing
from vipd.backends.ipvs.watching import Services
from vipd.proxy.names import Family, Protocol


def service(number: int) -> Service:
    return Service(Family.IPV4, Protocol.TCP, ip_address(f"10.96.0.{number}"), 80)


def destination(number: int, last: int) -> Destination:
    return Destination(service(number), ip_address(f"10.244.0.{last}"), 80)


def found(**counts: int) -> dict[Service, list[Counted]]:
    one = Counted(ip_address("10.244.0.1"), 80, 1, 0)
    return {service(int(name[1:])): [one] * count for name, count in counts.items()}


def observed() -> Services:
    things: list[Thing] = [service(1), destination(1, 1), destination(1, 2), service(2)]
    services = Services()
    services.observed(things)
    return services


def test_what_is_as_it_was_told_is_right_whatever_others_have() -> None:
    services = observed()
    done = [
        Operation(ADD, service(3), 0),
        Operation(ADD, destination(3, 1), 1),
        Operation(SET, destination(1, 1), 0),
        Operation(DELETE, destination(1, 2), 0),
        Operation(DELETE, service(2), 0),
    ]
    refused = Operation(ADD, destination(3, 2), 1)
    services.done([*done, refused], [refused])
    assert services.wrong(found(s1=1, s3=1, s99=4)) == []


def test_what_differs_is_told_once() -> None:
    services = observed()
    told = services.wrong(found(s1=1))
    assert [one.partition(": ")[2] or one for one in told] == [
        "1 real servers, not 2",
        f"virtual server {service(2)} is not there",
    ]
    assert services.wrong(found(s1=1)) == []


def test_what_was_half_done_is_a_reason_to_look() -> None:
    services = observed()
    services.doubt()
    assert services.wrong(found(s1=2, s2=0)) == ["something was half done"]
    assert services.wrong(found(s1=2, s2=0)) == []


def test_before_anything_was_observed_nothing_is_wrong() -> None:
    services = Services()
    services.doubt()
    services.done([Operation(ADD, service(1), 0)], [])
    assert services.wrong({}) == []
