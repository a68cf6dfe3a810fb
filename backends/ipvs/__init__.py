"""The IPVS backend: virtual servers in the kernel's own load balancer (docs/ipvs.md)."""
