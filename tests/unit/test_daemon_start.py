"""The daemon between its start and its first word to the API server."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.waiting import until

DEADLINE_SECONDS = 40
"""Less than an exec plugin may take (credentials.py)."""


async def test_it_can_be_stopped_while_it_reads_credentials(tmp_path: Path) -> None:
    begun, never = tmp_path / "begun", tmp_path / "never"
    os.mkfifo(never)
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "/bin/sh",
        "args": ["-c", f"echo $$ > {begun}.new; mv {begun}.new {begun}; cat {never}"],
        "interactiveMode": "Never",
    }
    kubeconfig = tmp_path / "kubeconfig"
    told = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"exec": plugin}}],
    }
    kubeconfig.write_text(json.dumps(told))
    arguments = ["run", "--kubeconfig", str(kubeconfig), "--socket", str(tmp_path / "vipd.sock")]
    command = [sys.executable, "-m", "vipd.proxy.cli", *arguments]
    daemon = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        await until(lambda: begun.exists() or daemon.returncode is not None)
        pid = int(begun.read_text())
        daemon.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_SECONDS):
            _, log = await daemon.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            daemon.kill()
        await daemon.wait()
    assert daemon.returncode == 0, log
    assert b"stop" in log
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (tmp_path / "vipd.sock").exists()
