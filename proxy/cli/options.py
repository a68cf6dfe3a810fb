"""Options that several commands share, so that they read the same everywhere.

Lives here: click decorators and how they become `Flags`. Must not: do anything. kube-proxy's flags
are in kube_proxy_options.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from vipd.proxy.config import DEFAULT_SOCKET, Flags

F = TypeVar("F", bound=Callable[..., Any])


def listing() -> dict[str, Any]:
    """Return what makes an option a list with commas that goes on where it is given again.

    As kube-proxy's (pflag StringSlice). Its value is one text, None where it is not given.
    """

    def joined(ctx: click.Context, _: click.Parameter, values: Sequence[str]) -> str | None:
        return ",".join(values) if values else None

    return {"multiple": True, "callback": joined}


_NODE_OPTIONS = [
    click.option(
        "--config",
        metavar="FILE",
        help="File of kind VipdConfiguration, KubeProxyConfiguration, or with one of each.",
    ),
    click.option(
        "--mode",
        "--proxy-mode",
        "mode",
        help="Dataplane: nftables, iptables, ipvs, userspace, or auto (the default): "
        "the first that works.",
    ),
    click.option(
        "--node-name",
        "--hostname-override",
        "node_name",
        metavar="NAME",
        help="This node's name. Default: the host name.",
    ),
    click.option(
        "--node-ip",
        metavar="IP[,IP]",
        help="Its addresses. Default: of its Node object.",
    ),
    click.option(
        "--cluster-cidr",
        metavar="CIDR[,CIDR]",
        help="Pod networks, one of each IP family.",
    ),
    click.option("--service-cidr", metavar="CIDR[,CIDR]", help="Ranges of cluster IPs."),
    click.option(
        "--nodeport-addresses",
        "node_port_addresses",
        metavar="CIDR,…|primary|all",
        help="Own addresses that answer node ports. Default: primary.",
        **listing(),
    ),
    click.option(
        "--masquerade-all/--no-masquerade-all",
        default=None,
        help="Masquerade all traffic to cluster IPs.",
    ),
    click.option(
        "--ipvs-scheduler",
        metavar="NAME",
        help="How mode ipvs chooses an endpoint where a Service does not say. Default: rr.",
    ),
]
_KUBECONFIG_OPTION = click.option(
    "--kubeconfig",
    metavar="FILE",
    help="Follow the API server that this file leads to. Default without manifests: in a pod, the"
    " cluster's own.",
)
_MANIFESTS_OPTION = click.option(
    "--manifests",
    multiple=True,
    metavar="PATH",
    help="File or folder of manifests, or - for standard input once. Repeatable.",
)
_DNS_LISTEN_OPTION = click.option(
    "--dns-listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Answer the cluster's names there, over UDP and TCP. Repeatable. Default: nowhere.",
)
_LOG_FORMAT_OPTION = click.option(
    "--log-format",
    "--logging-format",
    "log_format",
    type=click.Choice(["text", "json"]),
    help="How log lines are written to standard error. Default: text.",
)
_DRAIN_OPTION = click.option(
    "--drain",
    metavar="TIME",
    help="How long flows to an endpoint that left may go on, such as 5m. Default: 15m.",
)
_SOCKET_OPTION = click.option(
    "--socket",
    metavar="PATH",
    help=f"Control socket of the daemon. Default: {DEFAULT_SOCKET}",
)


def node_options(command: F) -> F:
    """Add the options that say what this node is."""
    for option in reversed(_NODE_OPTIONS):
        command = option(command)
    return command


def daemon_options(command: F) -> F:
    """Add the options of a daemon, but for those that other commands have, too."""
    for option in (_LOG_FORMAT_OPTION, _DNS_LISTEN_OPTION, _MANIFESTS_OPTION):
        command = option(command)
    return command


def kubeconfig_option(command: F) -> F:
    """Add --kubeconfig."""
    return _KUBECONFIG_OPTION(command)


def log_format_option(command: F) -> F:
    """Add --log-format."""
    return _LOG_FORMAT_OPTION(command)


def drain_option(command: F) -> F:
    """Add --drain."""
    return _DRAIN_OPTION(command)


def socket_option(command: F) -> F:
    """Add --socket."""
    return _SOCKET_OPTION(command)


def json_option(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def flags(manifests: tuple[str, ...] = (), **told: Any) -> Flags:
    """Return the flags as configuration reads them."""
    return Flags(manifests=manifests, **told)
