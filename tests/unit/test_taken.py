"""What is taken of a changed configuration reaches the parts of a daemon, and /configz tells it."""

from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from vipd.backends import sysctl
from vipd.proxy.config import Flags, as_file, load
from vipd.proxy.parts import Parts
from vipd.proxy.sources.manifests import ManifestSource
from vipd.proxy.switch import Record, State

HEAD = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\nmode: nftables\nnodeName: n\n"
NOWHERE = "healthz: '', metrics: ''"
OOM_SCORE = Path("/proc/self/oom_score_adj").read_text().strip()
"""As it is, so that nothing is written."""
TAKEN = f"""
nodeIPs: [192.0.2.1]
clusterCIDRs: [10.244.0.0/16]
serviceCIDRs: [10.96.0.0/16]
detectLocalMode: InterfaceNamePrefix
detectLocal: {{interfaceNamePrefix: cali}}
masqueradeAll: true
nodePortAddresses: [primary, 192.0.2.0/24]
serveExternalIPs: false
drainSeconds: 7
oomScoreAdj: {OOM_SCORE}
conntrack: {{maxPerCore: 0, udpTimeout: 41s}}
dns: {{ttl: 9}}
http: {{{NOWHERE}, mustBind: true, countsEndpoints: false}}
"""
NEXT_START = "masqueradeBit: 3\nipvs: {scheduler: lc}\nlogFormat: json\n"


async def test_what_is_taken_is_in_effect_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "sysctls/net/netfilter"
    settings.mkdir(parents=True)
    for name in ("max", "tcp_timeout_established", "tcp_timeout_close_wait", "udp_timeout"):
        (settings / f"nf_conntrack_{name}").write_text("30\n")
    for name in ("tcp_be_liberal", "udp_timeout_stream"):
        (settings / f"nf_conntrack_{name}").write_text("0\n")
    monkeypatch.setattr(sysctl, "MOUNTED", tmp_path / "sysctls")
    monkeypatch.setattr(sysctl, "ROOT", tmp_path / "read-only")
    file = tmp_path / "vipd.yaml"
    socket, manifests = str(tmp_path / "vipd.sock"), str(tmp_path)
    flags = Flags(config=str(file), socket=socket, manifests=(manifests,))
    file.write_text(f"{HEAD}http: {{{NOWHERE}}}\n")
    started = load(flags)
    source = ManifestSource((manifests,))
    start = Record("nftables", State("nftables"), "nftables")
    parts = Parts(started, source, flags, start, (), 0.0, lambda: None)
    try:
        before = as_file(parts.taken.in_effect(started))
        # What names of the network are answered for is known of the rest.
        assert before == {**as_file(started), "dns": before["dns"]}
        file.write_text(f"{HEAD}{TAKEN}{NEXT_START}")
        await parts.reloading.reread()
        now = parts.taken.in_effect(started)
        told = structs.replace(load(flags), dns=now.dns)
        unchanged = {one: as_file(started)[one] for one in ("masqueradeBit", "ipvs", "logFormat")}
        assert as_file(now) == {**as_file(told), **unchanged}
        assert now.dns.ttl == 9
        assert (settings / "nf_conntrack_udp_timeout").read_text() == "41"
        (named,) = parts.reloading.notes()
        assert named.endswith("next start only: masqueradeBit, ipvs.scheduler, logFormat")
        said = msgspec.json.decode((await parts.pages()["/configz"]()).body)
        theirs = said["kubeproxy.config.k8s.io"]
        assert theirs["conntrack"]["udpTimeout"] == "41s"
        assert theirs["nodePortAddresses"] == ["primary", "192.0.2.0/24"]
        assert said["vipd"]["dataplane"]["drain_seconds"] == 7
    finally:
        await parts.stop()
