"""What stands on a node that kube-proxy 1.36 has run on, as text for the tools that write it.

A service with a cluster IP, a node port, a load balancer address with source ranges, and session
affinity, in each mode; and what stands beside it: docker's, kubelet's, kube-router's and ours.
"""

from base64 import b32encode
from hashlib import sha256

from vipd.backends.kube_proxy import SETS, set_name
from vipd.proxy.names import Family

FAMILIES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
SERVICE = "shop/web:httptcp"


def hashed(text: str) -> str:
    return b32encode(sha256(text.encode()).digest()).decode()[:16]


SVC, EXT, FW, SVL = (f"KUBE-{kind}-{hashed(SERVICE)}" for kind in ("SVC", "EXT", "FW", "SVL"))


def addresses(family: Family) -> tuple[str, str, str, str, str]:
    """Return cluster IP, load balancer address, endpoint, its place, and loopback."""
    if family is Family.IPV4:
        return "10.96.0.10", "192.0.2.9", "10.244.1.5", "10.244.1.5:8080", "127.0.0.0/8"
    return "fd00:96::a", "2001:db8::9", "fd00:244::5", "[fd00:244::5]:8080", "::1/128"


MANGLE = "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n"
JUMPS = """\
-I INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
"""
MARKING = """\
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" \
-j MASQUERADE --random-fully
-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
"""
FORWARDING = """\
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 \
-j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""


def declared(*chains: str) -> str:
    return "".join(f":{one} - [0:0]\n" for one in chains)


def iptables_mode(family: Family) -> str:
    cluster, balancer, endpoint, place, loopback = addresses(family)
    sep = f"KUBE-SEP-{hashed(SERVICE + place)}"
    filters = ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-NODEPORTS")
    nats = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
    to = "-p tcp -m tcp"
    return (
        MANGLE
        + "*filter\n"
        + declared(*filters, "KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY")
        + JUMPS
        + '-I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals"'
        + " -j KUBE-SERVICES\n"
        + '-I FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals"'
        + " -j KUBE-SERVICES\n"
        + '-I INPUT -m comment --comment "kubernetes health check service ports"'
        + " -j KUBE-NODEPORTS\n"
        + "-I INPUT -m conntrack --ctstate NEW -m comment --comment "
        + '"kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES\n'
        + FORWARDING
        + f'-A KUBE-SERVICES -d {cluster} {to} -m comment --comment "shop/none has no endpoints"'
        + " --dport 81 -j REJECT\n"
        + f"-A KUBE-PROXY-FIREWALL -d {balancer} {to} --dport 80 -j DROP\n"
        + f"-A KUBE-NODEPORTS {to} --dport 31000 -j ACCEPT\n"
        + "COMMIT\n*nat\n"
        + declared(*nats, "KUBE-PROXY-CANARY", SVC, EXT, FW, SVL, sep)
        + MARKING
        + f'-A KUBE-SERVICES -d {cluster} {to} -m comment --comment "shop/web:http cluster IP"'
        + f" --dport 80 -j {SVC}\n"
        + f'-A KUBE-SERVICES -d {balancer} {to} -m comment --comment "shop/web:http loadbalancer '
        + f'IP" --dport 80 -j {FW}\n'
        + '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be'
        + f' the last rule in this chain" ! -d {loopback} -m addrtype --dst-type LOCAL'
        + " -j KUBE-NODEPORTS\n"
        + f"-A KUBE-NODEPORTS {to} --dport 30080 -j {EXT}\n"
        + f"-A {EXT} -j KUBE-MARK-MASQ\n-A {EXT} -j {SVC}\n"
        + f"-A {FW} -s {endpoint} -j {EXT}\n"
        + f"-A {FW} -m comment --comment "
        + '"other traffic to shop/web:http will be dropped by KUBE-PROXY-FIREWALL"\n'
        + f"-A {SVC} ! -s {endpoint} -d {cluster} {to} --dport 80 -j KUBE-MARK-MASQ\n"
        + f"-A {SVC} -m recent --name {sep} --rcheck --seconds 10800 --reap -j {sep}\n"
        + f"-A {SVC} -m statistic --mode random --probability 0.5000000000 -j {sep}\n"
        + f"-A {SVC} -j {sep}\n-A {SVL} -j {sep}\n"
        + f"-A {sep} -s {endpoint} -j KUBE-MARK-MASQ\n"
        + f"-A {sep} {to} -m recent --name {sep} --set -j DNAT --to-destination {place}\n"
        + "COMMIT\n"
    )


def ipvs_mode(family: Family) -> str:
    filters = ("KUBE-FORWARD", "KUBE-NODE-PORT", "KUBE-PROXY-FIREWALL", "KUBE-IPVS-FILTER")
    sets = {name: set_name(family, name) for name in SETS}

    def match(name: str, flags: str) -> str:
        return f"-m set --match-set {sets[name]} {flags}"

    return (
        MANGLE
        + "*filter\n"
        + declared(*filters, "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-OUT-FILTER")
        + JUMPS
        + '-I INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER\n'
        + '-I OUTPUT -m comment --comment "kubernetes ipvs access filter"'
        + " -j KUBE-IPVS-OUT-FILTER\n"
        + '-I INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT\n'
        + FORWARDING
        + f"-A KUBE-NODE-PORT {match('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')} -j ACCEPT\n"
        + f"-A KUBE-PROXY-FIREWALL {match('KUBE-LOAD-BALANCER-FW', 'dst,dst')}"
        + " -j KUBE-SOURCE-RANGES-FIREWALL\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL "
        + f"{match('KUBE-LOAD-BALANCER-SOURCE-CIDR', 'dst,dst,src')} -j RETURN\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL "
        + f"{match('KUBE-LOAD-BALANCER-SOURCE-IP', 'dst,dst,src')} -j RETURN\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL -j DROP\n"
        + f"-A KUBE-IPVS-FILTER {match('KUBE-LOAD-BALANCER', 'dst,dst')} -j RETURN\n"
        + f"-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW {match('KUBE-IPVS-IPS', 'dst')}"
        + " -j REJECT\n"
        + "COMMIT\n*nat\n"
        + declared("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER")
        + declared("KUBE-MARK-MASQ", "KUBE-MARK-DROP")
        + MARKING
        + f"-A KUBE-POSTROUTING {match('KUBE-LOOP-BACK', 'dst,dst,src')} -j MASQUERADE\n"
        + f"-A KUBE-SERVICES {match('KUBE-LOAD-BALANCER', 'dst,dst')} -j KUBE-LOAD-BALANCER\n"
        + f"-A KUBE-SERVICES {match('KUBE-CLUSTER-IP', 'src,dst')} -j KUBE-MARK-MASQ\n"
        + "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n"
        + f"-A KUBE-NODE-PORT -p tcp {match('KUBE-NODE-PORT-TCP', 'dst')} -j KUBE-MARK-MASQ\n"
        + "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n"
        + "COMMIT\n"
    )


def ipvs_sets(family: Family) -> str:
    cluster, balancer, endpoint, *_ = addresses(family)
    inet = f"family inet{'6' if family is Family.IPV6 else ''} maxelem 65536"
    lines = []
    for name in SETS:
        full = set_name(family, name)
        if name.endswith(("-TCP", "-UDP", "CHECK-NODE-PORT")):
            lines.append(f"create {full} bitmap:port range 0-65535")
        elif name == "KUBE-IPVS-IPS":
            lines.append(f"create {full} hash:ip {inet}")
        elif name.endswith("CIDR"):
            lines.append(f"create {full} hash:ip,port,net {inet}")
        elif name.endswith(("SOURCE-IP", "LOOP-BACK")):
            lines.append(f"create {full} hash:ip,port,ip {inet}")
        else:
            lines.append(f"create {full} hash:ip,port {inet}")
    lines += [
        f"add {set_name(family, name)} {entry}"
        for name, entry in (
            ("KUBE-CLUSTER-IP", f"{cluster},tcp:80"),
            ("KUBE-LOAD-BALANCER", f"{balancer},tcp:80"),
            ("KUBE-LOOP-BACK", f"{endpoint},tcp:8080,{endpoint}"),
            ("KUBE-NODE-PORT-TCP", "30080"),
            ("KUBE-IPVS-IPS", cluster),
        )
    ]
    return "\n".join(lines) + "\n"


NFTABLES_MODE = """
table {word} kube-proxy {{
  comment "rules for kube-proxy"
  set cluster-ips {{
    type {type}; comment "Active ClusterIPs"; elements = {{ {cluster} }}
  }}
  map service-ips {{
    type {type} . inet_proto . inet_service : verdict
    elements = {{ {cluster} . tcp . 80 : goto service-ULMVA6XW-shop/web/tcp/http }}
  }}
  chain service-ULMVA6XW-shop/web/tcp/http {{
    meta l4proto tcp dnat {word} to numgen random mod 1 map {{ 0 : {endpoint} . 8080 }}
  }}
  chain services {{
    {word} daddr . meta l4proto . th dport vmap @service-ips
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority -100; jump services
  }}
  chain nat-output {{
    type nat hook output priority -100; jump services
  }}
}}
"""


def nftables_mode(family: Family) -> str:
    cluster, _, endpoint, *_ = addresses(family)
    return NFTABLES_MODE.format(
        word=FAMILIES[family],
        type="ipv4_addr" if family is Family.IPV4 else "ipv6_addr",
        cluster=cluster,
        endpoint=endpoint,
    )


FOREIGN = """\
*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NWPLCY-DEFAULT-ABCDEFGH - [0:0]
:KUBE-POD-FW-ABCDEFGHABCDEFGH - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-ROUTER-SERVICES - [0:0]
:KUBE-SVC-ABCDEFGHABCDEFGH - [0:0]
:VIPD-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "not a jump: -j KUBE-SERVICES and \\"-j KUBE-NODEPORTS\\"" -j ACCEPT
-A FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j VIPD-SERVICES
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL ! -s {loopback} -d {loopback} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT \
-j DROP
-A KUBE-ROUTER-FORWARD -g KUBE-POD-FW-ABCDEFGHABCDEFGH
-A VIPD-SERVICES -m comment --comment "shop/web:http has no endpoints" -j DROP
COMMIT
*nat
:DOCKER - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SEP-abcdefghabcdefgh - [0:0]
:KUBE-SVC-ABCDEFGH - [0:0]
:KUBE-SVC-ABCDEFGHABCDEFGHA - [0:0]
:VIPD-MARK-MASQ - [0:0]
:VIPD-SERVICES - [0:0]
:VIPD-SVC-ABCDEFGHABCDEFGH - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "kubernetes service portals" -j VIPD-SERVICES
-A POSTROUTING -s {endpoint} ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A VIPD-SERVICES -d {cluster} -p tcp -m tcp --dport 80 -j VIPD-SVC-ABCDEFGHABCDEFGH
-A VIPD-SVC-ABCDEFGHABCDEFGH -p tcp -j DNAT --to-destination {place}
COMMIT
"""


def foreign(family: Family) -> str:
    cluster, _, endpoint, place, loopback = addresses(family)
    return FOREIGN.format(cluster=cluster, endpoint=endpoint, place=place, loopback=loopback)
