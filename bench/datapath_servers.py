"""The endpoint of `vipd bench datapath`: fast servers in one pod of the lab.

Lives here: starting nginx, iperf3 and the UDP server, and when they are ready. Must not: ask them.
They end with the lab.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vipd.bench import datapath_tools, lab_hosts
from vipd.bench.datapath_plan import SERVER, SERVICE_PORTS, Measure
from vipd.bench.lab import Lab
from vipd.bench.lab_errors import LabError

_PORTS = {name: target for name, _, _, target in SERVICE_PORTS}
_READY_SECONDS = 10.0
_POLL_SECONDS = 0.01
_NGINX = """\
daemon off;
user root;
worker_processes {workers};
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    lingering_close off;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    server {{
        listen {port} reuseport backlog=4096;
        location / {{ default_type text/plain; return 200 "the answer\\n"; }}
    }}
}}
"""


def nginx_configuration(folder: Path, workers: int, idle: int) -> str:
    """Return what nginx reads: one short answer, no log, connections as long as one likes."""
    return _NGINX.format(folder=folder, workers=workers, files=idle + 4000, port=_PORTS["http"])


class Servers:
    """What answers in the pod, from entering the block on until the lab ends."""

    def __init__(
        self, lab: Lab, folder: Path, measures: Sequence[Measure], workers: int, idle: int
    ) -> None:
        self._lab = lab
        self._folder = folder
        self._measures = measures
        self._workers = workers
        self._idle = idle
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Servers":
        configuration = self._folder / "nginx.conf"
        configuration.write_text(nginx_configuration(self._folder, self._workers, self._idle))
        log = str(self._folder / "nginx.log")
        self._start(datapath_tools.path("nginx"), "-e", log, "-c", str(configuration))
        if Measure.BULK in self._measures:
            self._start(
                datapath_tools.path("iperf3"),
                "--server",
                "--version4",
                "--port",
                str(_PORTS["bulk"]),
            )
            self._wait("bulk")
        if Measure.UDP in self._measures:
            program = (sys.executable, "-P", "-m", "vipd.bench.datapath_datagrams")
            for _ in range(self._workers):
                self._start(*program, "serve", str(_PORTS["udp"]))
        self._wait("http")
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._started:
            one.terminate()
        for one in self._started:
            one.wait()

    def _start(self, *command: str) -> None:
        self._started.append(
            self._lab.popen(
                SERVER,
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C on the terminal is for whoever started it.
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        )

    def _wait(self, name: str) -> None:
        """Wait until a TCP port is listened on; raise LabError."""
        path = self._lab.path(SERVER)
        deadline = time.monotonic() + _READY_SECONDS
        while not lab_hosts.listens(path, _PORTS[name]):
            if time.monotonic() > deadline:
                log = self._folder / "nginx.log"
                said = log.read_text() if name == "http" and log.exists() else ""
                raise LabError(f"no {name} server on {SERVER}: {said or 'it does not listen'}")
            time.sleep(_POLL_SECONDS)
