"""What a process that stays goes without, to be small: the daemon, workers, DNS servers.

Lives here: modules that are kept out before anything imports them, and memory that is given back.
Must not: be called by a process that is soon over.
"""

import contextlib
import sys
from importlib import import_module

_WITHOUT_HTTPS = ("http.client", "urllib.request")
"""Modules of the standard library that leave HTTPS out for good where there is no ``ssl``."""
_OWN_HASHES = ("_md5", "_sha1", "_sha256", "_sha512", "_sha3", "_blake2")


def without_openssl() -> None:
    """Keep OpenSSL out: 5 to 8 MB of a process, and nothing here is encrypted.

    asyncio does without ``ssl``, and hashlib without ``_hashlib``, as they have to where Python was
    built without OpenSSL; hashlib only where Python has the hashes itself.
    """
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        for name in _OWN_HASHES:
            import_module(name)
    except ImportError:
        return
    sys.modules["_hashlib"] = None  # type: ignore[assignment]


def with_openssl() -> None:
    """Let what needs OpenSSL import it after all; what did without goes on without.

    aiohttp imports modules that leave HTTPS out then. They are imported anew by whoever comes
    next; who has them already keeps them as they are, and speaks no HTTPS.
    """
    if not sys.modules.get("ssl", True):
        del sys.modules["ssl"]
        for name in _WITHOUT_HTTPS:
            sys.modules.pop(name, None)


def without_rich() -> None:
    """Keep rich out: 7 MB, which structlog imports where it is there, for logs of another form."""
    sys.modules["rich"] = None  # type: ignore[assignment]


def give_back() -> None:
    """Give back to the kernel what only the start needed: 1 MB after the imports.

    malloc keeps what is freed below something that is not. A libc that is not GNU's has no such
    call.
    """
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
