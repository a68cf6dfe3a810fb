"""What libraries import only when they need it: here, while this process may still read everything.

Lives here: imports. Must not: do anything else. As nobody, a process may not get at a Python that
lies in somebody's home, or at a virtual environment there.
"""

from importlib import import_module

_WHEN_CALLED = ("concurrent.futures.thread", "dns.zonefile")
_RECORD_TYPES = (
    *(f"dns.rdtypes.ANY.{one}" for one in ("CAA", "CNAME", "HINFO", "MX", "PTR", "TXT")),
    *(f"dns.rdtypes.IN.{one}" for one in ("A", "AAAA", "HTTPS", "SRV", "SVCB")),
)


def import_early() -> None:
    """Import them: 1 MB."""
    for name in (*_WHEN_CALLED, *_RECORD_TYPES):
        import_module(name)
