"""What a switch to userspace mode is verified by: refusals that are known are no differences."""

from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.settings import DataplaneSettings, UserspaceSettings
from vipd.proxy.virtualserver import Endpoint, Key, Kind, NodeNetwork, Use, VirtualServer

VIP, POD = parse_address("10.96.1.2"), parse_address("10.244.1.2")


def server(protocol: Protocol, port: int) -> VirtualServer:
    return VirtualServer(
        key=Key(Family.IPV4, VIP, protocol, port),
        owner=ServicePortName(NamespacedName("x", "a"), "", protocol),
        kind=Kind.CLUSTER,
        cluster=(Endpoint(POD, 80, local=True),),
        local=(),
        use=Use.CLUSTER,
    )


def test_a_refusal_that_is_known_is_no_difference() -> None:
    compiler = UserspaceCompiler(DataplaneSettings(userspace=UserspaceSettings()))
    web, sctp = server(Protocol.TCP, 80), server(Protocol.SCTP, 9)
    network = NodeNetwork()
    nothing = compiler.compile((), network)
    _, after = compiler.plan(None, compiler.compile((web, sctp), network))
    program = compiler.without(nothing, after, [sctp.key])
    observed = compiler.load(compiler.dump(program))
    plan, _ = compiler.plan(observed, program)
    assert plan.due()
    assert not plan.due([sctp.key])
    # What is really missing is one, whatever was refused.
    lacking, _ = compiler.plan(compiler.load(compiler.dump(nothing)), program)
    assert lacking.due([sctp.key])
