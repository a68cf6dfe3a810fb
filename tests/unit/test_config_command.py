"""`vipd config`: what is wrong with a file, and what counts where from."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.unit.test_kube_proxy_configuration import HEAD, KUBEADM

from vipd.proxy.cli.config import config

VIPD = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"


def vipd_config(*arguments: str) -> Result:
    return CliRunner().invoke(config, arguments, catch_exceptions=False)


def test_a_good_file_and_what_in_it_has_no_effect() -> None:
    told = vipd_config("check", str(KUBEADM))
    assert (told.exit_code, told.stderr) == (0, "")
    note, verdict = told.stdout.splitlines()
    assert note.startswith(f"no effect: {KUBEADM}: iptables.localhostNodePorts: node ports do not")
    assert verdict == f"{KUBEADM}: nothing is wrong"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (f"{HEAD}mode: x\noomScoreAdj: y\n", ["oomScoreAdj: Expected", "mode: 'x' is no mode"]),
        (f"{VIPD}mod: ipvs\ndrainSeconds: -1\n", ["mod: there is no such field; did", "drainSec"]),
        (f"{VIPD}dns: {{ttl: 9999, workers: 0}}\n", ["dns.ttl: 9999", "dns.workers: 0"]),
        ("kind: Service\n", ["kind is 'Service'"]),
        (f"{VIPD}mode: [", ["not YAML"]),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, problems: list[str]) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    told = vipd_config("check", str(file))
    assert told.exit_code == 1
    lines = told.stderr.splitlines()
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"vipd: {file}: ")
        assert problem in line
    assert "nothing is wrong" not in told.stdout


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    told = vipd_config("check", str(tmp_path / "none"))
    assert (told.exit_code, told.stdout) == (1, "")
    assert "No such file" in told.stderr


def test_each_value_and_who_says_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(f"{HEAD}clusterCIDR: 10.0.0.0/8\nportRange: 1-2\n---\n{VIPD}drainSeconds: 7\n")
    told = vipd_config("show", "--config", str(file), "--proxy-mode=nftables")
    assert told.exit_code == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in told.stdout.splitlines()}
    assert rows["mode"] == "nftables --mode"
    assert rows["clusterCIDRs"] == f"10.0.0.0/8 {file}: clusterCIDR"
    assert rows["drainSeconds"] == f"7 {file}: drainSeconds"
    by_default = f"{file}: conntrack (kube-proxy's default)"
    assert rows["conntrack.min"] == f"131072 {by_default}"
    assert "serviceCIDRs" not in rows
    assert rows["no"].startswith(f"effect: {file}: portRange: ")
    whole = vipd_config("show", "--config", str(file), "--all").stdout
    assert any(line.split() == ["serviceCIDRs", "none", "default"] for line in whole.splitlines())
    fields = json.loads(vipd_config("show", "--config", str(file), "--json").stdout)["fields"]
    assert fields["serviceCIDRs"] == {"value": [], "from": "default"}
    assert fields["drainSeconds"] == {"value": 7, "from": f"{file}: drainSeconds"}
