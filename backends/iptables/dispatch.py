"""The dispatch: from address, protocol and port of a packet to the chain of its virtual server.

Lives here: a tree over the bits of keys, its chains, and the difference of two trees. Must not:
know what the chains that it leads to do.

A key is a number: the bits of the address (none for a node port), two for the protocol, sixteen for
the port. A node with few keys is a bucket: a rule for each. A larger one is a branch: it looks at
the first two bits in which its keys differ, and has a rule for each value that occurs, which leads
on to a chain, or for a single key to its virtual server. So the shape of the tree depends on the
set of keys alone, not on the order in which they came; a change touches the chains on the way to
its key, and a restart finds the very chains that it would make.
"""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from vipd.backends.iptables.objects import PROTOCOLS, Chain, Rule, hashed
from vipd.proxy.names import Protocol
from vipd.proxy.virtualserver import Key

BUCKET = 8
"""Keys that stand in one chain at most."""
_PORT_BITS = 18
_PROTOCOL_NUMBER = {Protocol.TCP: 0, Protocol.UDP: 1, Protocol.SCTP: 2}
_PROTOCOL_WORD = {number: PROTOCOLS[one] for one, number in _PROTOCOL_NUMBER.items()}


class Leaf(NamedTuple):
    """A key as a number, and the chain of its virtual server."""

    bits: int
    target: str
    key: Key


class Branch(NamedTuple):
    """A node with many keys. `shift` is how many bits stand behind the two it looks at.

    `nodes` are its children with their two bits, sorted; a child is a bucket or a branch.
    """

    shift: int
    nodes: "tuple[tuple[int, Node], ...]"
    size: int
    above: int
    """The bits before the two, which all its keys have."""


Bucket = tuple[Leaf, ...]
Node = Bucket | Branch
EMPTY: Bucket = ()


class Change(NamedTuple):
    """What becomes of a chain: its old and its new form, None where there is none."""

    old: Chain | None
    new: Chain | None


def leaf(key: Key, target: str) -> Leaf:
    """Return the leaf of a virtual server."""
    number = 0 if key.address is None else int(key.address)
    number = number << 2 | _PROTOCOL_NUMBER[key.protocol]
    return Leaf(number << 16 | key.port, target, key)


def size(node: Node) -> int:
    """Return how many keys there are in a tree."""
    return node.size if isinstance(node, Branch) else len(node)


def build(leaves: Iterable[Leaf]) -> Node:
    """Return the tree of these leaves."""
    return _build(sorted(leaves))


def with_leaf(node: Node, one: Leaf) -> Node:
    """Return the tree with a leaf added, or replaced where its key is there. O(depth)."""
    if not isinstance(node, Branch):
        return _build(sorted([*(it for it in node if it.bits != one.bits), one]))
    if one.bits >> node.shift + 2 != node.above:
        return _branch([node], one)
    digit = one.bits >> node.shift & 3
    nodes = dict(node.nodes)
    nodes[digit] = with_leaf(nodes.get(digit, EMPTY), one)
    return _of(node, nodes)


def without_key(node: Node, bits: int) -> Node:
    """Return the tree without a key; the same tree where it is not there. O(depth)."""
    if not isinstance(node, Branch):
        return tuple(it for it in node if it.bits != bits)
    digit = bits >> node.shift & 3
    nodes = dict(node.nodes)
    if bits >> node.shift + 2 != node.above or digit not in nodes:
        return node
    child = without_key(nodes[digit], bits)
    if size(child):
        nodes[digit] = child
    else:
        del nodes[digit]
    return _of(node, nodes)


def leaves(node: Node) -> Iterator[Leaf]:
    """Yield the leaves of a tree in order."""
    if isinstance(node, Branch):
        for _, child in node.nodes:
            yield from leaves(child)
    else:
        yield from node


def chains(node: Node, root: str, width: int) -> Iterator[Chain]:
    """Yield the chains of a tree; `root` is the name of the first, `width` the address bits."""
    yield _chain(node, root, width)
    for name, child in _below(node, width):
        yield from chains(child, name, width)


def way(node: Node, root: str, width: int, bits: int) -> Iterator[Chain]:
    """Yield the chains that a packet with this key can meet, in order. O(depth)."""
    yield _chain(node, root, width)
    if isinstance(node, Branch) and bits >> node.shift + 2 == node.above:
        child = dict(node.nodes).get(bits >> node.shift & 3, EMPTY)
        if size(child) > 1:
            yield from way(child, _name(child_prefix(node, bits), node.shift, width), width, bits)


def child_prefix(node: Branch, bits: int) -> int:
    """Return the bits that lead to the child of a branch where a key is."""
    return node.above << 2 | bits >> node.shift & 3


def differences(old: Node, new: Node, root: str, width: int) -> Iterator[Change]:
    """Yield the chains that differ between two trees. O(change) where they share their nodes."""
    changes: dict[str, Change] = {}
    for change in _differences(old, new, root, root, width):
        one = change.new or change.old
        if one is None:
            continue
        was = changes.get(one.name, Change(None, None))
        changes[one.name] = Change(change.old or was.old, change.new or was.new)
    return (one for one in changes.values() if one.old != one.new)


def _differences(old: Node, new: Node, before: str, name: str, width: int) -> Iterator[Change]:
    """Yield changes of the chains of `old`, whose first is called `before`, to those of `new`."""
    if old is new and before == name:
        return
    yield Change(_chain(old, before, width), None)
    yield Change(None, _chain(new, name, width))
    if old is new:
        return  # the chains below have the same names: they are called after their bits
    if isinstance(old, Branch) and isinstance(new, Branch):
        if old.shift < new.shift and old.above >> new.shift - old.shift == new.above:
            yield from _lower(old, new, before, width)
            return
        if new.shift < old.shift and new.above >> old.shift - new.shift == old.above:
            for change in _lower(new, old, name, width):
                yield Change(change.new, change.old)
            return
    olds, news = dict(_below(old, width)), dict(_below(new, width))
    for one, child in olds.items():
        if one in news:
            yield from _differences(child, news[one], one, one, width)
        else:
            yield from (Change(chain, None) for chain in chains(child, one, width))
    for one, child in news.items():
        if one not in olds:
            yield from (Change(None, chain) for chain in chains(child, one, width))


def _lower(old: Branch, new: Branch, before: str, width: int) -> Iterator[Change]:
    """Yield changes below a new branch that looks at earlier bits: the old one is in a child."""
    inside = _name(old.above >> new.shift - old.shift - 2, new.shift, width)
    for name, child in _below(new, width):
        if name == inside:
            yield from _differences(old, child, before, name, width)
        else:
            yield from (Change(None, chain) for chain in chains(child, name, width))


def _build(sorted_leaves: Sequence[Leaf]) -> Node:
    if len(sorted_leaves) <= BUCKET:
        return tuple(sorted_leaves)
    shift = _shift(sorted_leaves[0].bits, sorted_leaves[-1].bits)
    nodes: list[tuple[int, Node]] = []
    first = 0
    while first < len(sorted_leaves):
        digit = sorted_leaves[first].bits >> shift
        last = first + 1
        while last < len(sorted_leaves) and sorted_leaves[last].bits >> shift == digit:
            last += 1
        nodes.append((digit & 3, _build(sorted_leaves[first:last])))
        first = last
    return Branch(shift, tuple(nodes), len(sorted_leaves), sorted_leaves[0].bits >> shift + 2)


def _branch(nodes: Sequence[Branch], one: Leaf) -> Branch:
    """Return a branch above a branch and a leaf that does not belong into it."""
    (node,) = nodes
    some = node.above << node.shift + 2
    shift = _shift(some, one.bits)
    pairs: list[tuple[int, Node]] = [(some >> shift & 3, node), (one.bits >> shift & 3, (one,))]
    children = sorted(pairs, key=lambda pair: pair[0])
    return Branch(shift, tuple(children), node.size + 1, one.bits >> shift + 2)


def _shift(one: int, other: int) -> int:
    """Return how many bits stand behind the pair in which two different numbers first differ."""
    return ((one ^ other).bit_length() - 1) // 2 * 2


def _of(node: Branch, nodes: dict[int, Node]) -> Node:
    """Return a branch with other children, in the one shape that its keys can have."""
    total = sum(map(size, nodes.values()))
    children = tuple(sorted(nodes.items()))
    if total <= BUCKET:
        return tuple(one for _, child in children for one in leaves(child))
    if len(children) == 1:
        return children[0][1]
    return Branch(node.shift, children, total, node.above)


def _below(node: Node, width: int) -> list[tuple[str, Node]]:
    """Return the children that have a chain, with its name."""
    if not isinstance(node, Branch):
        return []
    return [
        (_name(node.above << 2 | digit, node.shift, width), child)
        for digit, child in node.nodes
        if size(child) > 1
    ]


def _chain(node: Node, name: str, width: int) -> Chain:
    if not isinstance(node, Branch):
        rules = tuple(Rule(match(one.bits, 0, width), f"-g {one.target}", one.key) for one in node)
        return Chain(name, rules)
    made = []
    for digit, child in node.nodes:
        if not isinstance(child, Branch) and len(child) == 1:
            one = child[0]
            made.append(Rule(match(one.bits, 0, width), f"-g {one.target}", one.key))
        else:
            bits = node.above << 2 | digit
            made.append(
                Rule(match(bits, node.shift, width), f"-g {_name(bits, node.shift, width)}")
            )
    return Chain(name, tuple(made))


def _name(bits: int, shift: int, width: int) -> str:
    return hashed("D", f"{width}/{shift}/{bits:x}")


def match(bits: int, shift: int, width: int) -> str:
    """Return the match for all keys that begin with `bits`, behind which `shift` bits stand."""
    if shift >= _PORT_BITS:
        number = bits << shift - _PORT_BITS
        return f"-d {_address(number, width)}/{width - (shift - _PORT_BITS)}"
    whole = bits << shift
    text = f"-d {_address(whole >> _PORT_BITS, width)}/{width}" if width else ""
    protocol = _PROTOCOL_WORD[whole >> 16 & 3]
    if shift == 16:
        return f"{text} -p {protocol}".strip()
    port = whole & 0xFFFF
    last = port + (1 << shift) - 1
    ports = str(port) if last == port else f"{port}:{last}"
    return f"{text} -p {protocol} -m {protocol} --dport {ports}".strip()


def _address(number: int, width: int) -> str:
    return str(IPv4Address(number) if width == 32 else IPv6Address(number))
