"""What `nft --json` of 1.0.6 printed, recorded, becomes what the compiler writes.

`VIPD_RECORD=1` (as root) records anew, in a network namespace.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.cases.test_resolve import FOLDER, events, read

from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.observed import Observed, decode, slots_of
from vipd.backends.nftables.plan import compile_program, expected, plan
from vipd.proxy.names import Family
from vipd.proxy.resolve import resolve
from vipd.proxy.snapshot import Snapshot, fold

RECORDED = Path(__file__).parents[1] / "golden" / "observed"
CASES = [
    "affinity-on-every-address",
    "algorithms-with-weights",
    "cluster-ip-dual-stack",
    "external-policy-local-nobody-here",
    "no-slices",
    "source-ranges",
]


def program(name: str) -> Program:
    case = read(FOLDER / f"{name}.yaml")
    snapshot, _ = fold(Snapshot(), events(case.manifests, []))
    table = resolve(snapshot, case.node.settings())
    return compile_program(table.virtual_servers(), table.network)


def recording(name: str) -> list[bytes]:
    path = RECORDED / f"{name}.json"
    if os.environ.get("VIPD_RECORD"):
        space = f"vipd-record-{os.getpid()}"
        nft = ["ip", "netns", "exec", space, "nft"]
        subprocess.run(["ip", "netns", "add", space], check=True)
        try:
            text = str(plan(None, program(name))[0])
            subprocess.run([*nft, "-f", "-"], input=text.encode(), check=True)
            listed = [
                json.loads(subprocess.check_output([*nft, "-j", "list", "table", word, table]))
                for word in ("ip", "ip6")
                for table in ("vipd", "vipd-skeleton")
            ]
        finally:
            subprocess.run(["ip", "netns", "delete", space], check=True)
        for one in listed:  # what rules look like is of no interest, and much
            for item in one["nftables"]:
                item.get("rule", {}).pop("expr", None)
        path.parent.mkdir(exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, listed)) + "\n]\n")
    return [json.dumps(one).encode() for one in json.loads(path.read_text())]


@pytest.mark.parametrize("name", CASES)
def test_recorded_listings(name: str) -> None:
    seen, wanted = decode(recording(name)), expected(program(name))
    assert seen.elements == wanted.elements
    assert seen.tables == wanted.tables
    assert seen.skeletons == wanted.skeletons
    assert seen.containers.keys() == wanted.containers.keys()
    for family in Family:
        assert sorted(seen.own_maps(family)) == sorted(wanted.own_maps(family))


@pytest.mark.parametrize("name", CASES)
def test_slots_are_read_back(name: str) -> None:
    wanted = program(name)
    seen = decode(recording(name))
    held = slots_of(seen, Family.IPV4) | slots_of(seen, Family.IPV6)
    for key, entry in wanted.entries.items():
        cluster, local = held.get(key, ((), ()))
        assert [str(one) for one in cluster] == [str(one) for one in entry.cluster]
        assert [str(one) for one in local] == [str(one) for one in entry.local]


def test_nothing_is_nothing() -> None:
    assert decode([]) == Observed()


def test_protocol_numbers_mean_the_same_as_names() -> None:
    """Where the image has no /etc/protocols (Debian's package netbase), tcp is printed as 6."""
    numbers = {"tcp": 6, "udp": 17, "sctp": 132}

    def numbered(value: object) -> object:
        if isinstance(value, dict):
            return {key: numbered(one) for key, one in value.items()}
        if isinstance(value, list):
            return [numbered(one) for one in value]
        return numbers.get(value, value) if isinstance(value, str) else value

    name = "external-policy-local-nobody-here"
    listings = [json.dumps(numbered(json.loads(one))).encode() for one in recording(name)]
    assert decode(listings).elements == expected(program(name)).elements
