"""Names looked up by the resolvers that pods have: glibc's, musl's and Go's, through resolv.conf.

The same names for each of them, as each asks in its own way: A and AAAA at once from one socket or
one after the other, with or without EDNS, over UDP or TCP, by search list and ndots:5.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.netns.cluster import Cluster, Manifest, endpoint_slice, service, until
from tests.netns.test_dns_server import ask

from vipd.bench import lab_resolv
from vipd.bench.lab import Lab
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

AT = "169.254.20.10"
WEB4, WEB6, FOUR = "10.96.0.10", "fd00:10:96::10", "10.96.0.11"
MANY = [f"10.244.{100 + n // 250}.{n % 250 + 1}" for n in range(200)]
"""Endpoints of a headless service: 3,200 bytes of answers, so UDP holds a part of them."""
BOTH = sorted((WEB4, WEB6))
NAMES: dict[str, list[str]] = {
    "web": BOTH,
    "web.test": BOTH,
    "web.test.svc.cluster.local": BOTH,
    "web.test.svc.cluster.local.": BOTH,
    "WeB.tEsT": BOTH,
    "alias": BOTH,
    "four": [FOUR],
    "nobody": [],
    "nobody.test.svc.cluster.local.": [],
    "many": sorted(MANY),
}


@pytest.fixture(scope="module")
def cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    built = Cluster(lab, tmp_path_factory.mktemp("vipd"), "--dns-listen", AT)
    port: list[Manifest] = [{"name": "http", "port": 80, "protocol": "TCP"}]
    alias: Manifest = {"type": "ExternalName", "externalName": "web.test.svc.cluster.local"}
    every: list[Manifest] = [{"addresses": [one], "conditions": {"ready": True}} for one in MANY]
    built.apply(
        service("web", parse_address(WEB4), parse_address(WEB6), ports=port),
        service("four", parse_address(FOUR), ports=port),
        service("alias", **alias),
        service("many", clusterIP="None", ports=port),
        endpoint_slice("many-1", Family.IPV4, every, port, of="many"),
    )
    netns = lab.namespace("client-1")
    try:
        built.start()
        lab_resolv.point_at_nameserver(netns, lab.prefix, parse_address(AT), "test")
        until(lambda: ask(lab, "web.test.svc.cluster.local", "A", AT) == [WEB4], "it is answered")
        yield built
    finally:
        lab_resolv.forget_nameserver(netns, lab.prefix)
        built.stop()
        done = built.cli("cleanup", "--socket", built.socket)
        assert done.returncode == 0, done.stdout + done.stderr


def looked_up(cluster: Cluster, command: Sequence[str], options: str = "") -> dict[str, list[str]]:
    """Let a program look all names up; it prints the addresses of each as JSON, in order."""
    environment = ["env", f"RES_OPTIONS={options}", "GODEBUG=netdns=go"]
    done = cluster.lab.exec("client-1", [*environment, *command, *NAMES])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: sorted(set(found)) for name, found in zip(NAMES, lines, strict=True)}


GLIBC = """
import json, socket, sys
for name in sys.argv[1:]:
    try:
        told = socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        print(json.dumps([one[4][0] for one in told]))
    except socket.gaierror as error:
        assert error.errno in (socket.EAI_NONAME, socket.EAI_NODATA), error
        print("[]")
"""


@pytest.mark.parametrize("options", ["", "single-request", "edns0 single-request-reopen", "use-vc"])
def test_glibc(cluster: Cluster, options: str) -> None:
    assert looked_up(cluster, [sys.executable, "-c", GLIBC], options) == NAMES


MUSL = r"""
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>

int main(int count, char **names) {
    for (int at = 1; at < count; at++) {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
        int code = getaddrinfo(names[at], "80", &hints, &found);
        if (code && code != EAI_NONAME && code != EAI_NODATA) {
            fprintf(stderr, "%s: %s\n", names[at], gai_strerror(code));
            return 1;
        }
        const char *between = "[";
        for (struct addrinfo *one = found; one; one = one->ai_next) {
            char text[INET6_ADDRSTRLEN];
            const void *address = one->ai_family == AF_INET
                ? (void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
                : (void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
            inet_ntop(one->ai_family, address, text, sizeof text);
            printf("%s\"%s\"", between, text);
            between = ", ";
        }
        printf("%s]\n", found ? "" : "[");
    }
    return 0;
}
"""


def test_musl(cluster: Cluster, tmp_path: Path) -> None:
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("musl-gcc is not there: Debian's musl-tools")
    source, program = tmp_path / "look.c", tmp_path / "look"
    source.write_text(f"#define _GNU_SOURCE\n{MUSL}")
    subprocess.run([compiler, "-static", "-o", str(program), str(source)], check=True)
    found = looked_up(cluster, [str(program)])
    # Before 1.2.4 musl knows no TCP, and takes what a truncated reply holds.
    many = found.pop("many")
    assert many
    assert set(many) <= set(MANY)
    assert found == {name: addresses for name, addresses in NAMES.items() if name != "many"}


GO = """
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
)

func main() {
	for _, name := range os.Args[1:] {
		found, err := net.DefaultResolver.LookupHost(context.Background(), name)
		var failure *net.DNSError
		if err != nil && !(errors.As(err, &failure) && failure.IsNotFound) {
			fmt.Fprintln(os.Stderr, name, err)
			os.Exit(1)
		}
		if found == nil {
			found = []string{}
		}
		line, _ := json.Marshal(found)
		fmt.Println(string(line))
	}
}
"""


def test_go(cluster: Cluster, tmp_path: Path) -> None:
    compiler = shutil.which("go", path=f"{os.environ['PATH']}:/usr/local/go/bin")
    if compiler is None:
        pytest.skip("go is not there: Debian's golang-go")
    source, program = tmp_path / "look.go", tmp_path / "look"
    source.write_text(GO)
    command = [compiler, "build", "-o", str(program), str(source)]
    subprocess.run(
        command, check=True, env={**os.environ, "CGO_ENABLED": "0", "GO111MODULE": "off"}
    )
    assert looked_up(cluster, [str(program)]) == NAMES
