"""docs/metrics.md has every metric as it is, and what to do about every alert."""

import re
from pathlib import Path

from tests.unit.test_alerts import ALERTS, PAGE

from vipd.proxy.metrics.connections import MOST_ENDPOINTS, MOST_SERVICES
from vipd.proxy.metrics.described import KUBE_PROXY, MODES, OWN, PROCESS, Described

TEXT = PAGE.read_text()


def row(one: Described) -> str:
    labels = ", ".join(f"`{label}`" for label in one.labels)
    modes = "" if one.modes == MODES else ", ".join(one.modes)
    return f"| `{one.name}` | {one.type} | {labels} | {modes} | {one.help} |"


def test_every_metric_has_its_row_and_no_other_is_there() -> None:
    described = [row(one) for one in (*KUBE_PROXY, *OWN, *PROCESS)]
    there = re.findall(r"^\| `\w+` \| (?:counter|gauge|histogram) \|.*$", TEXT, re.MULTILINE)
    assert there == described


def test_every_alert_has_its_section() -> None:
    pattern = re.compile(r"^### (Vipd\w+)\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
    sections = dict(pattern.findall(TEXT))
    assert list(sections) == [one["alert"] for one in ALERTS]
    for one in ALERTS:
        assert one["annotations"]["runbook"] == f"docs/metrics.md#{one['alert'].lower()}"
        assert one["labels"]["severity"] in ("critical", "warning", "info")
        assert len(sections[one["alert"]].split()) > 10


def test_the_most_series_are_said() -> None:
    assert f"**At most {MOST_SERVICES:,} service ports and {MOST_ENDPOINTS:,} endpoints" in TEXT


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([\w.]+\.md)", TEXT):
        assert (Path(PAGE).parent / target).exists(), target
