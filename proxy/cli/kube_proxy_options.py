"""kube-proxy's flags at vipd's command line: those that mean something, and those that do not.

Lives here: the flags, and how Go's way of writing them is read. Must not: know what they do.
Source: cmd/kube-proxy/app/options.go and k8s.io/component-base/logs (v1.37). vipd has flags of its
own for some (options.py); --cleanup and --init-only are not flags of settings.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from vipd.proxy.cli.options import listing
from vipd.proxy.config.kube_proxy_meaning import WITHOUT_EFFECT
from vipd.proxy.version import VERSION

F = TypeVar("F", bound=Callable[..., Any])

_TEXTS = {
    "--bind-address": ("IP", "This node's address, over its Node object's. No socket is bound."),
    "--detect-local-mode": (
        "MODE",
        "How pods are told: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix.",
    ),
    "--pod-bridge-interface": ("NAME", "The pods' bridge, for BridgeInterface."),
    "--pod-interface-name-prefix": ("PREFIX", "Of pods' interfaces, for InterfaceNamePrefix."),
    "--ipvs-tcp-timeout": ("TIME", "Idle TCP connections in mode ipvs; 0: the kernel's."),
    "--ipvs-tcpfin-timeout": ("TIME", "The same after a FIN."),
    "--ipvs-udp-timeout": ("TIME", "The same for UDP."),
    "--conntrack-tcp-timeout-established": ("TIME", "Idle tracked TCP connections."),
    "--conntrack-tcp-timeout-close-wait": ("TIME", "The same in CLOSE_WAIT."),
    "--conntrack-udp-timeout": ("TIME", "Tracked UDP flows without an answer."),
    "--conntrack-udp-timeout-stream": ("TIME", "Tracked UDP flows with answers."),
    "--healthz-bind-address": ("IP[:PORT]", "Where /healthz and /livez answer; empty: nowhere."),
    "--metrics-bind-address": ("IP[:PORT]", "Where /metrics answers; empty: nowhere."),
}
_NUMBERS = {
    "--conntrack-max-per-core": "Most tracked connections for each processor; 0: as it is.",
    "--conntrack-min": "Most tracked connections at least.",
    "--iptables-masquerade-bit": "Bit of the packet mark that asks for masquerade, 0 to 31.",
    "--oom-score-adj": "oom_score_adj of this process, -1000 to 1000.",
    "--healthz-port": "0: no health server.",
    "--metrics-port": "0: no metrics server.",
}
_SWITCHES = {
    "--conntrack-tcp-be-liberal": "Take packets outside of the TCP window for valid.",
    "--ipvs-strict-arp": "Answer ARP only for addresses of the interface asked.",
    "--bind-address-hard-fail": "End where a health or metrics server cannot listen.",
}
TEXTS_WITHOUT_EFFECT = {
    "--master": "",
    "--kube-api-content-type": "clientConnection.contentType",
    "--kube-api-burst": "clientConnection.burst",
    "--kube-api-qps": "clientConnection.qps",
    "--show-hidden-metrics-for-version": "showHiddenMetricsForVersion",
    "--iptables-sync-period": "iptables.syncPeriod",
    "--iptables-min-sync-period": "iptables.minSyncPeriod",
    "--ipvs-sync-period": "ipvs.syncPeriod",
    "--ipvs-min-sync-period": "ipvs.minSyncPeriod",
    "--ipvs-exclude-cidrs": "ipvs.excludeCIDRs",
    "--config-sync-period": "configSyncPeriod",
    "--proxy-port-range": "portRange",
    "--v": "logging.verbosity",
    "--vmodule": "logging.vmodule",
    "--log-flush-frequency": "logging.flushFrequency",
    "--log-json-info-buffer-size": "logging.options.json.infoBufferSize",
    "--log-text-info-buffer-size": "logging.options.text.infoBufferSize",
    "--network-name": "winkernel.networkName",
    "--source-vip": "winkernel.sourceVip",
    "--root-hnsendpoint-name": "winkernel.rootHnsEndpointName",
}
"""And the field of KubeProxyConfiguration that is the same; --master has none."""
SWITCHES_WITHOUT_EFFECT = {
    "--profiling": "enableProfiling",
    "--iptables-localhost-nodeports": "iptables.localhostNodePorts",
    "--log-json-split-stream": "logging.options.json.splitStream",
    "--log-text-split-stream": "logging.options.text.splitStream",
    "--enable-dsr": "winkernel.enableDSR",
    "--forward-healthcheck-vip": "winkernel.forwardHealthCheckVip",
    "--windows-service": "windowsRunAsService",
}
_INSTEAD_OF_MASTER = "the kubeconfig says where the API server is"
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")
"""strconv.ParseBool of Go."""
_GIVEN = "vipd.flags without effect"


class KubeProxyCommand(click.Command):
    """A command whose switches may be written ``--name=true`` and ``--name=false``, as Go's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, written in either way."""
        switches = {
            name: (one.opts[0], one.secondary_opts[0])
            for one in self.params
            if isinstance(one, click.Option) and one.is_flag and one.secondary_opts
            for name in one.opts
        }
        return super().parse_args(ctx, _as_click_writes(args, switches))


def _as_click_writes(args: Sequence[str], switches: dict[str, tuple[str, str]]) -> list[str]:
    found: list[str] = []
    for at, one in enumerate(args):
        if one == "--":
            return [*found, *args[at:]]
        name, equals, value = one.partition("=")
        if one.startswith("-v="):
            found.append(f"--v={value}")
        elif equals and name in switches:
            on, off = switches[name]
            if value not in (*_TRUE, *_FALSE):
                raise click.UsageError(f"{name}: {value!r} is neither true nor false")
            found.append(on if value in _TRUE else off)
        else:
            found.append(one)
    return found


def kube_proxy_options(command: F) -> F:
    """Add kube-proxy's flags; those without effect are gathered as `without_effect`."""
    options = [
        click.option(name, metavar=metavar, help=text) for name, (metavar, text) in _TEXTS.items()
    ]
    options += [
        click.option(name, type=int, metavar="N", help=text) for name, text in _NUMBERS.items()
    ]
    options += [
        click.option(f"{name}/--no-{name[2:]}", default=None, help=text)
        for name, text in _SWITCHES.items()
    ]
    options += [
        click.option(*_spellings(name), **_without_effect(name, field))
        for name, field in TEXTS_WITHOUT_EFFECT.items()
    ]
    options += [
        click.option(f"{name}/--no-{name[2:]}", default=None, **_without_effect(name, field))
        for name, field in SWITCHES_WITHOUT_EFFECT.items()
    ]
    options += [
        click.option(
            "--feature-gates",
            metavar="NAME=true|false,…",
            help="Of kube-proxy's, AllowServiceExternalIPs means something.",
            **listing(),
        ),
        click.option(
            "--version",
            is_flag=False,
            flag_value="true",
            is_eager=True,
            expose_value=False,
            metavar="[true|raw]",
            callback=_tell_version,
            help="Print the version, and end.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _tell_version(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Print the version and end, as k8s.io/component-base/version/verflag does."""
    if value is None or value in _FALSE or ctx.resilient_parsing:
        return
    if value not in (*_TRUE, "raw"):
        raise click.UsageError(f"--version: {value!r} is neither true, false nor raw")
    click.echo(f"vipd, version {VERSION}")
    ctx.exit()


def without_effect() -> tuple[tuple[str, str], ...]:
    """Return the flags that were given and change nothing, with what happens instead."""
    return tuple(click.get_current_context().meta.get(_GIVEN, ()))


def _spellings(name: str) -> tuple[str, ...]:
    return ("-v", "--v") if name == "--v" else (name,)


def _without_effect(name: str, field: str) -> dict[str, Any]:
    def note(ctx: click.Context, _: click.Parameter, value: object) -> None:
        if value:
            instead = WITHOUT_EFFECT[field] if field else _INSTEAD_OF_MASTER
            ctx.meta.setdefault(_GIVEN, []).append((name, instead))

    return {"hidden": True, "expose_value": False, "callback": note}
