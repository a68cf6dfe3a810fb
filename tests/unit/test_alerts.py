"""Alert rules and the dashboard: promtool takes them, they fire, and read metrics there are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.metric_names import EVERYTHING, named
from tests.unit.test_metrics import Rig

from vipd.dns.server.metrics import METRICS as OF_DNS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yaml"
DASHBOARD = ROOT / "deploy/grafana/vipd.json"
PAGE = ROOT / "docs/metrics.md"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool here (apt-get install prometheus)"
)
ALERTS: list[dict[str, Any]] = [
    one for group in yaml.safe_load(RULES.read_text())["groups"] for one in group["rules"]
]

# What makes each alert fire, and it alone: series of two hours, a value a minute.
HERE = 'instance="node-1"'
BUILD = {f"vipd_build_info{{{HERE}}}": "1x120"}
FIRES: dict[str, dict[str, str]] = {
    "VipdDown": {f'up{{job="vipd",{HERE}}}': "0x120"},
    "VipdAbsent": {'vipd_build_info{instance="none"}': "_x120"},
    "VipdRestarting": {f"process_start_time_seconds{{{HERE}}}": "0+1x120"},
    "VipdNotSynced": {f"vipd_synced{{{HERE}}}": "0x120"},
    "VipdSyncFailing": {f"vipd_sync_failing{{{HERE}}}": "1x120"},
    "VipdSyncHung": {
        f"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{{{HERE}}}": "6000x120",
        f"kubeproxy_sync_proxy_rules_last_timestamp_seconds{{{HERE}}}": "5990x120",
    },
    "VipdDegraded": {f"vipd_degraded{{{HERE}}}": "1x120"},
    "VipdServicesRejected": {f"vipd_services_rejected{{{HERE}}}": "2x120"},
    "VipdObjectsUnreadable": {f"vipd_problems{{{HERE}}}": "1x120"},
    "VipdConflicts": {f"vipd_conflicts{{{HERE}}}": "1x120"},
    "VipdApiSilent": {f'vipd_api_silence_seconds{{kind="Service",{HERE}}}': "0+60x120"},
    "VipdProgrammingSlow": {
        f'kubeproxy_network_programming_duration_seconds_bucket{{le="10",{HERE}}}': "0x120",
        f'kubeproxy_network_programming_duration_seconds_bucket{{le="20",{HERE}}}': "0+9x120",
        f'kubeproxy_network_programming_duration_seconds_bucket{{le="+Inf",{HERE}}}': "0+9x120",
    },
    "VipdDriftRepeated": {f"vipd_repairs_total{{{HERE}}}": "0+1x120"},
    "VipdConntrackNearFull": {
        f"vipd_conntrack_entries{{{HERE}}}": "90x120",
        f"vipd_conntrack_limit{{{HERE}}}": "100x120",
    },
    "VipdConntrackDropping": {f'vipd_conntrack_lost_total{{why="drop",{HERE}}}': "0+1x120"},
    "VipdSettingRefused": {f'vipd_settings_refused{{setting="a",{HERE}}}': "1x120"},
    "VipdSwitchFailed": {
        f'vipd_switches_total{{mode="ipvs",outcome="failure",{HERE}}}': "0x110 1x10"
    },
    "VipdWorkersMissing": {
        f"vipd_workers{{{HERE}}}": "1x120",
        f"vipd_workers_wanted{{{HERE}}}": "2x120",
    },
    "VipdWorkersFull": {f"vipd_workers_full{{{HERE}}}": "1x120"},
    "VipdDnsFailing": {f"vipd_dns_server_synced{{{HERE}}}": "0x120"},
    "VipdDnsErrors": {
        f"vipd_dns_build_info{{{HERE}}}": "1x120",
        f'coredns_dns_responses_total{{rcode="SERVFAIL",{HERE}}}': "0+1x120",
        f'coredns_dns_responses_total{{rcode="NOERROR",{HERE}}}': "0+9x120",
    },
    "VipdXtablesLockContended": {f"vipd_xtables_lock_waits_total{{{HERE}}}": "0+30x120"},
    "VipdCountsIncomplete": {f"vipd_connection_counts_failures_total{{{HERE}}}": "0+1x120"},
}
QUIET = {
    f'up{{job="vipd",{HERE}}}': "1x120",
    f"process_start_time_seconds{{{HERE}}}": "5x120",
    f"vipd_synced{{{HERE}}}": "1x120",
    f"vipd_sync_failing{{{HERE}}}": "0x120",
    # A cluster in which nothing has changed for hours, and one in which something always does.
    f'kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{{ip_family="IPv4",{HERE}}}': "5x120",
    f'kubeproxy_sync_proxy_rules_last_timestamp_seconds{{ip_family="IPv4",{HERE}}}': "6x120",
    f'kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{{ip_family="IPv6",{HERE}}}': (
        "60+60x120"
    ),
    f'kubeproxy_sync_proxy_rules_last_timestamp_seconds{{ip_family="IPv6",{HERE}}}': "50+60x120",
    f"vipd_degraded{{{HERE}}}": "0x120",
    f"vipd_services_rejected{{{HERE}}}": "0x120",
    f"vipd_problems{{{HERE}}}": "0x120",
    f"vipd_conflicts{{{HERE}}}": "0x120",
    f'vipd_api_silence_seconds{{kind="Service",{HERE}}}': "50x120",
    f'vipd_api_silence_seconds{{kind="Namespace",{HERE}}}': "900x120",
    f'kubeproxy_network_programming_duration_seconds_bucket{{le="10",{HERE}}}': "0+9x120",
    f'kubeproxy_network_programming_duration_seconds_bucket{{le="+Inf",{HERE}}}': "0+9x120",
    f"vipd_repairs_total{{{HERE}}}": "0x60 1x60",
    f"vipd_conntrack_entries{{{HERE}}}": "80x120",
    f"vipd_conntrack_limit{{{HERE}}}": "100x120",
    f'vipd_conntrack_lost_total{{why="insert_failed",{HERE}}}': "0+1x120",
    f'vipd_switches_total{{mode="ipvs",outcome="success",{HERE}}}': "0x110 1x10",
    f"vipd_workers{{{HERE}}}": "2x120",
    f"vipd_workers_wanted{{{HERE}}}": "2x120",
    f"vipd_workers_full{{{HERE}}}": "0x120",
    f"vipd_dns_server_up{{{HERE}}}": "1x120",
    f"vipd_dns_server_synced{{{HERE}}}": "1x120",
    f"vipd_dns_build_info{{{HERE}}}": "1x120",
    f'coredns_dns_responses_total{{rcode="SERVFAIL",{HERE}}}': "0+1x120",
    f'coredns_dns_responses_total{{rcode="NOERROR",{HERE}}}': "0+90x120",
    f"vipd_xtables_lock_waits_total{{{HERE}}}": "0+1x120",
    f"vipd_connection_counts_failures_total{{{HERE}}}": "0x60 1x60",
}


def promtool(*arguments: str, text: str = "") -> str:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_each_alert_fires_alone_and_none_on_a_quiet_node(tmp_path: Path) -> None:
    assert set(FIRES) == {one["alert"] for one in ALERTS}

    def case(series: dict[str, str], *fire: str) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": k, "values": v} for k, v in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "119m",
                    "exp_samples": [
                        {"labels": f'{{alertname="{one}"}}', "value": 1} for one in fire
                    ],
                }
            ],
        }

    cases = [
        case(series if name == "VipdAbsent" else BUILD | series, name)
        for name, series in FIRES.items()
    ]
    told = {"rule_files": [str(RULES)], "tests": [case(BUILD | QUIET), *cases]}
    path = tmp_path / "alerts.test.yaml"
    path.write_text(yaml.safe_dump(told))
    promtool("test", "rules", str(path))


@needs_promtool
def test_our_names_are_as_prometheus_wants_them() -> None:
    lines = Rig().text().decode().splitlines(keepends=True)
    promtool("check", "metrics", text="".join(one for one in lines if "kubeproxy_" not in one))


def queries() -> Iterator[tuple[str, str]]:
    """The queries of the dashboard, each with the title of its panel."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@needs_promtool
def test_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"q:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, (_, expression) in enumerate(queries())
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_they_read_metrics_that_are_exported() -> None:
    expressions = [*queries(), *((one["alert"], one["expr"]) for one in ALERTS)]
    for where, expression in expressions:
        unknown = named(expression) - EVERYTHING.keys() - OF_DNS.keys()
        assert not unknown, f"{where} reads {unknown}"
        for name, labels in re.findall(r"\b(\w+) ?\{([^}]*)\}", expression):
            bare = next(iter(named(name)), None)
            if bare in EVERYTHING:
                asked = set(re.findall(r"(\w+) ?=~?", labels)) - {"instance", "job"}
                assert asked <= set(EVERYTHING[bare].labels), where


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, expression in queries() for name in named(expression)}
    left_out = {
        # Parts of what is shown, or of the process.
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
        "kubeproxy_sync_proxy_rules_iptables_total",
        "kubeproxy_sync_proxy_rules_iptables_last",
    }
    assert {one for one in EVERYTHING if one.startswith(("vipd", "kube"))} - shown == left_out
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    assert all(one["title"] for one in panels)
