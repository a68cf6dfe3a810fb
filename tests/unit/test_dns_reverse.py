"""Names above the addresses that services have: right while these come and go, and cheap."""

import random

import dns.message
import dns.rcode
import pytest
from tests.unit.dns_zone_facts import answering, read, web

from vipd.dns import reverse
from vipd.dns.answer import Answers
from vipd.dns.names import reverse_name
from vipd.dns.reverse import At, ReverseNames
from vipd.dns.service_names import ServiceNames
from vipd.proxy.names import parse_network


def test_addresses_that_come_and_go_are_above_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one or many at once; `below` is what a plain search of all of them finds."""
    monkeypatch.setattr(reverse, "MOST_TOUCHED", 8)
    chance = random.Random(7)
    names = ReverseNames([parse_network("10.0.0.0/8"), parse_network("fd00::/16")])
    service = ServiceNames(b"\1a\1n", web())
    there: set[bytes] = set()
    for _ in range(300):
        for _ in range(chance.choice((0, 1, 1, 2, 5, 20))):
            low = bytes((chance.randrange(3), chance.randrange(3), chance.randrange(3)))
            packed = chance.choice((b"\x0a", b"\xfd\0" + bytes(11))) + low
            if packed in there:
                names.remove(packed, service)
            else:
                names.add(packed, service)
            there ^= {packed}
        for asked in (
            bytes((10, chance.randrange(3))),
            bytes((10, *chance.choices(range(3), k=2))),
        ):
            place = names.place(reverse_name(asked + bytes(4 - len(asked)))[2 * (4 - len(asked)) :])
            assert place is not None
            found = any(len(one) == 4 and one.startswith(asked) for one in there)
            assert (place.at is At.BETWEEN) is found


def test_one_address_more_is_not_a_reason_to_sort_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sorting: list[int] = []

    def counted(those: list[bytes]) -> list[bytes]:
        sorting.append(len(those))
        return sorted(those)

    monkeypatch.setattr(reverse, "sorted", counted, raising=False)
    answers = answering(*(web(f"10.96.1.{at}", f"web-{at}") for at in range(200)))
    for at in range(50):
        answers.zone.put(web(f"10.96.2.{at}", "other"))
        assert rcode(answers, f"99.{at + 10}.96.10.in-addr.arpa") == dns.rcode.NXDOMAIN
        assert rcode(answers, "2.96.10.in-addr.arpa") == dns.rcode.NOERROR
    assert sorting == [201]


def rcode(answers: Answers, name: str) -> int:
    return read(answers.udp(dns.message.make_query(name, "PTR").to_wire())).rcode()
