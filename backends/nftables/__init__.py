"""The nftables backend: slot maps under a constant set of chains (docs/nftables.md)."""
