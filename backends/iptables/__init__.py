"""The iptables backend: a tree of chains, one rule for an endpoint (docs/iptables.md)."""
