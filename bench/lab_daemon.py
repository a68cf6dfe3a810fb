"""vipd itself on a node of the lab, over a folder of manifests.

Lives here: how the daemon is started, known to be synced, and stopped. Must not: know what the
manifests say. Used by the demo and by whoever needs the whole daemon in the lab.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError

CLI = (sys.executable, "-P", "-m", "vipd.proxy.cli")
_POLL_SECONDS = 0.02
_STOP_SECONDS = 10.0


class Daemon:
    """One `vipd run` on the lab's proxy node; `directory` takes its control socket and its log.

    `source` is a folder of manifests, or the arguments that name another source.
    """

    def __init__(
        self, lab: Lab, source: Path | Sequence[str], directory: Path, mode: str = "nftables"
    ) -> None:
        self.socket = directory / "vipd.sock"
        self.log = directory / "vipd.log"
        self.under: tuple[str, ...] = ()
        """The command that starts it, such as setpriv with what it may do; empty: none."""
        self._lab = lab
        self._process: subprocess.Popen[bytes] | None = None
        topology = lab.topology
        named = ("--manifests", str(source)) if isinstance(source, Path) else tuple(source)
        self.arguments: tuple[str, ...] = (
            *("run", "--mode", mode, *named),
            *("--node-name", topology.proxy_node),
            *("--cluster-cidr", ",".join(map(str, topology.pod_ranges))),
            *("--socket", str(self.socket)),
        )

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that is run on the node."""
        return (*CLI, *self.arguments)

    def start(self, timeout: float = 20.0) -> float:
        """Start it and wait until it is synced; return the seconds that took. Raise LabError."""
        start = time.monotonic()
        with self.log.open("ab") as log:
            self._process = self._lab.popen(
                self._lab.topology.proxy_node,
                [*self.under, *CLI, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C on the terminal is for whoever started it, who then stops it in order.
                start_new_session=True,
            )
        while not self._is_synced():
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_POLL_SECONDS)
                raise LabError(f"vipd ended with status {code}:\n{self.log_tail()}")
            if time.monotonic() > start + timeout:
                raise LabError(f"vipd is not synced after {timeout:.0f} s:\n{self.log_tail()}")
        return time.monotonic() - start

    def _is_synced(self) -> bool:
        """Whether `vipd status --json` says `"synced": true`; False while nobody answers."""
        if not self.socket.exists():
            return False
        asked = subprocess.run(
            [*CLI, "status", "--json", "--socket", str(self.socket)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        try:
            said = json.loads(asked.stdout)
        except ValueError:
            return False
        return isinstance(said, dict) and said.get("synced") is True

    def stop(self) -> None:
        """Ask it to end and wait for it; kill it where it does not within ten seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that it printed."""
        printed = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(printed[-lines:]) or "(it printed nothing)"
