"""The command line without a daemon: exit codes and messages."""

import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = (
    "run",
    "status",
    "services",
    "mode",
    "config",
    "check",
    "render",
    "plan",
    "explain",
    "env",
    "cleanup",
    "lab",
    "bench",
)
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints: [{addresses: [10.244.1.21]}]
"""


def vipd(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "vipd.proxy.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **how,
    )


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "web.yaml").write_text(SERVICE)
    return folder


def test_help_names_every_command() -> None:
    told = vipd("--help")
    assert told.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in told.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    told = vipd(command, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(f"Usage: vipd {command}")


def test_help_names_every_mode() -> None:
    from vipd.backends.registry import AUTO, MODES

    told = " ".join(vipd("run", "--help").stdout.split())
    assert f"Dataplane: {', '.join(MODES)}, or {AUTO}" in told


def test_the_version() -> None:
    from vipd.proxy.version import VERSION

    assert vipd("--version").stdout == f"vipd, version {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nothing"], "nothing"),
        (["status", "--nothing"], "--nothing"),
        (["status", "extra"], "extra"),
        (["render"], "--manifests"),
        (["plan"], "--manifests"),
        (["run"], "--manifests"),
        (["run", "folder"], "did you mean --manifests?"),
        (["run", "--manifests", "/tmp", "--log-format", "xml"], "xml"),
        (["render", "-f", "/dev/null", "--mode", "magic"], "--mode: 'magic' is no mode"),
        (["render", "-f", "/dev/null", "--cluster-cidr", "x"], "--cluster-cidr: 'x' is no CIDR"),
        (["render", "-f", "/dev/null", "--config", "/none"], "--config: /none: No such file"),
        (["run", "--manifests", "/tmp", "--socket", f"/tmp/{'x' * 108}"], "107 bytes"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], word: str, tmp_path: Path) -> None:
    told = vipd(*arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert word in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: VipdConfiguration\napiVersion: vipd/v1alpha1\nclusterCDIR: x", ("clusterCDIR",)),
        (
            "kind: VipdConfiguration\napiVersion: vipd/v1alpha1\nmasqueradeAll: 3",
            ("masqueradeAll", "bool"),
        ),
        ("kind: Service\napiVersion: v1", ("kind is 'Service'",)),
    ],
)
def test_a_bad_configuration(
    tmp_path: Path, manifests: Path, text: str, words: tuple[str, ...]
) -> None:
    config = tmp_path / "vipd.yaml"
    config.write_text(text)
    for command in (["render", "-f"], ["run", "--manifests"]):
        told = vipd(*command, str(manifests), "--config", str(config))
        assert (told.returncode, told.stdout) == (2, "")
        assert all(word in told.stderr for word in (str(config), *words))
        assert len(told.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["render"], ["plan", "--node-name", "n"]])
def test_manifests_that_are_not_there(tmp_path: Path, command: list[str]) -> None:
    told = vipd(*command, "-f", str(tmp_path / "none"))
    assert (told.returncode, told.stdout) == (1, "")
    assert str(tmp_path / "none") in told.stderr


class TestRender:
    def test_prints_the_program(self, manifests: Path) -> None:
        told = vipd("render", "-f", str(manifests), "--node-name", "n")
        assert (told.returncode, told.stderr) == (0, "")
        assert "add table ip vipd\n" in told.stdout
        assert "10.96.0.10 . tcp . 80" in told.stdout
        assert "10.244.1.21 . 8080" in told.stdout

    def test_the_same_each_time(self, manifests: Path) -> None:
        texts = {
            vipd("render", "-f", str(manifests), env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2", "3")
        }
        assert len(texts) == 1

    def test_from_standard_input(self, manifests: Path) -> None:
        told = vipd("render", "-f", "-", input=SERVICE)
        assert told.returncode == 0
        assert told.stdout == vipd("render", "-f", str(manifests)).stdout

    def test_what_cannot_be_read_is_named_and_the_rest_rendered(self, manifests: Path) -> None:
        (manifests / "bad.yaml").write_text(SERVICE.replace("port: 80}", "port: 0}"))
        told = vipd("render", "-f", str(manifests))
        assert told.returncode == 3
        assert "bad.yaml" in told.stderr
        assert "spec.ports[0].port" in told.stderr
        assert "add table ip vipd\n" in told.stdout

    def test_conflicts_are_named(self, manifests: Path) -> None:
        (manifests / "zzz.yaml").write_text(SERVICE.replace("name: web,", "name: zzz,"))
        told = vipd("render", "-f", str(manifests))
        assert told.returncode == 3
        assert "10.96.0.10:80/TCP is claimed by default/web" in told.stderr

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
    def test_as_nobody_and_without_nft(self, tmp_path: Path) -> None:
        nobody = pwd.getpwnam("nobody")
        # -E … PATH: nothing of this user's is needed, nor any tool.
        program = (
            "import difflib, os, sys\n"  # click imports difflib lazily, and nobody may not read it
            "from vipd.proxy.cli.main import main\n"
            f"import vipd.proxy.cli.offline, vipd.backends.registry, vipd.proxy.config\n"
            "import vipd.proxy.sources.manifests, vipd.proxy.resolve, vipd.proxy.views\n"
            "import vipd.proxy.control, vipd.backends.nftables.backend\n"
            "import vipd.backends.nftables.driver\n"
            f"os.setgid({nobody.pw_gid}); os.setuid({nobody.pw_uid})\n"
            "sys.argv = ['vipd', 'render', '-f', '-']\n"
            "main()\n"
        )
        told = subprocess.run(
            [sys.executable, "-P", "-c", program],
            input=SERVICE,
            env={**os.environ, "PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (told.returncode, told.stderr) == (0, "")
        assert told.stdout == vipd("render", "-f", "-", input=SERVICE).stdout


class TestPlan:
    def test_without_a_daemon_it_is_everything(self, manifests: Path) -> None:
        if Path("/run/vipd/vipd.sock").exists():
            pytest.skip("a daemon runs on this machine")
        told = vipd("plan", "-f", str(manifests), "--node-name", "n")
        assert told.returncode == 0
        assert told.stdout == vipd("render", "-f", str(manifests), "--node-name", "n").stdout

    def test_with_a_socket_that_nobody_listens_on(self, manifests: Path, tmp_path: Path) -> None:
        told = vipd("plan", "-f", str(manifests), "--socket", str(tmp_path / "s"))
        assert (told.returncode, told.stdout) == (1, "")
        assert "no vipd listens on" in told.stderr


@pytest.mark.parametrize("command", ["status", "services"])
def test_nobody_listens(tmp_path: Path, command: str) -> None:
    told = vipd(command, "--socket", str(tmp_path / "s"))
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"vipd: no vipd listens on {tmp_path}/s (is `vipd run` running?)\n"


def test_the_reader_of_the_output_goes_away(manifests: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vipd.proxy.cli", "render", "-f", str(manifests)],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr
    assert done.returncode != 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--version"], ["render", "--help"]], ids=" ".join)
def test_an_output_that_is_full_is_one_sentence(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vipd.proxy.cli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "vipd: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_a_limit_that_is_too_low_is_told_with_what_it_is_and_what_is_wanted() -> None:
    done = vipd("check", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (900, 900)))
    (line,) = [one for one in done.stdout.splitlines() if "open files" in one]
    assert line == (
        "  open files     missing, which vipd can do without: a worker started from here may have "
        "900, and 65536 are wanted: raise the hard limit (LimitNOFILE= of systemd, ulimit -Hn)"
    )
