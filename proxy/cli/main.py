"""The command `vipd`: one name for each thing a person does; the work is elsewhere.

Lives here: the group, exit codes, and errors as sentences. A command's module is imported only when
that command is called, so that `vipd status` does not pay for `vipd bench`.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 degraded.
"""

import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from vipd.proxy import lean
from vipd.proxy.errors import ConfigError, VipdError
from vipd.proxy.version import VERSION

FAILED, USAGE, DEGRADED = 1, 2, 3
_SAYS_MANIFESTS = re.compile(rb"""^[^#\n]*\bmanifests["']?[ \t]*:""", re.MULTILINE)
"""In a configuration file, without reading it as YAML."""
_STAYS = (["run"], ["dns", "serve"])
"""The commands that stay until they are ended, so that their size counts."""

# name → (module, attribute, one line for the list of commands)
_COMMANDS = {
    "run": ("vipd.proxy.cli.run", "run", "Serve the services of this node: the daemon."),
    "status": ("vipd.proxy.cli.reads", "status", "How the daemon is: mode, syncs, problems."),
    "services": ("vipd.proxy.cli.services", "services", "Virtual servers and their endpoints."),
    "metrics": ("vipd.proxy.cli.metrics", "metrics", "What it counts, as Prometheus reads it."),
    "mode": ("vipd.proxy.cli.mode", "mode", "The dataplane in use, or a live switch to another."),
    "config": ("vipd.proxy.cli.config", "config", "Is a configuration right, and what counts."),
    "check": ("vipd.proxy.cli.reads", "check", "What this kernel and host can do, mode by mode."),
    "render": ("vipd.proxy.cli.offline", "render", "The program for manifests, as text; no root."),
    "plan": ("vipd.proxy.cli.offline", "plan", "What a commit of manifests would change, as text."),
    "explain": ("vipd.proxy.cli.explain", "explain", "What a packet meets, step by step, and why."),
    "dns": ("vipd.proxy.cli.dns", "dns", "The cluster's DNS server: serve it alone."),
    "env": ("vipd.proxy.cli.env", "env", "The variables of services that a pod is started with."),
    "cleanup": ("vipd.proxy.cli.cleanup", "cleanup", "Remove every trace from this node."),
    "lab": ("vipd.proxy.cli.lab", "lab", "A playground of network namespaces."),
    "bench": ("vipd.proxy.cli.bench", "bench", "Measure: time to program, to first packet."),
}


class Commands(click.Group):
    """The group; knows its commands' names without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order people meet them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None for a name that is none."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{attribute} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in _COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="vipd")
def cli() -> None:
    """A service load balancer for every node of a cluster.

    It makes service addresses work through nftables, iptables, IPVS or worker processes, and
    switches between them live. Start with `vipd lab demo` as root.
    """


def _may_ask_api_server(words: Sequence[str]) -> bool:
    """Whether a command that stays may need TLS, as far as can be told before anything is read."""
    if any(word.startswith("--kubeconfig") for word in words):
        return True
    if any(word.startswith(("--manifests", "-f")) for word in words):
        return False
    for flag, file in zip(words, (*words[1:], ""), strict=True):
        path = flag.partition("=")[2] if flag.startswith("--config=") else file
        if flag.partition("=")[0] == "--config":
            try:
                with open(path, "rb") as config:
                    return not _SAYS_MANIFESTS.search(config.read(1 << 20))
            except OSError:
                return False
    return True


def main() -> None:
    """Run the command line; every expected error is one sentence on standard error."""
    if any(sys.argv[1 : 1 + len(one)] == one for one in _STAYS):
        lean.without_rich()
        if not _may_ask_api_server(sys.argv):
            lean.without_openssl()
    try:
        try:
            cli.main(prog_name="vipd", standalone_mode=True)
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        click.echo(f"vipd: {error}", err=True)
        sys.exit(USAGE)
    except VipdError as error:
        click.echo(f"vipd: {error}", err=True)
        sys.exit(FAILED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: not worth a word
        sys.exit(FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries to write the rest at its end
        click.echo(f"vipd: standard output: {error.strerror}", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
