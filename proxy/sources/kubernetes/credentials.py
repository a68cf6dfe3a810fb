"""Where the API server is and who we are: a kubeconfig file, or what a pod is given.

Lives here: the one place that knows the client library (kubernetes_asyncio), of which only the
reading of credentials is used. Must not: ask the API server anything.

Credentials change while the daemon runs: tokens of pods every hour, client certificates, tokens of
exec plugins. They are read again when they are older than a minute, as client-go does
(transport/token_source.go), and when the server did not accept them.
"""

import asyncio
import importlib.util
import logging
import os
import re
import ssl
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from hashlib import sha256
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import structlog
from msgspec import Struct
from yaml import YAMLError

from vipd.proxy.errors import ConfigError, SourceError
from vipd.proxy.sources.kubernetes.plugin import Plugin

FRESH_SECONDS = 60.0
PLUGIN_SECONDS = 60.0
"""How long an exec plugin may take."""
_LIBRARY = "kubernetes_asyncio"
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
IN_CLUSTER = "in-cluster credentials"

log = structlog.get_logger()


class Access(Struct, frozen=True):
    """What a request needs. `server` is a URL without a slash at its end."""

    server: str
    ssl: ssl.SSLContext | None
    server_name: str | None
    """The name that the server's certificate is checked for, where it is not the URL's."""
    proxy: str | None
    authorization: str
    """The header's value, empty where a client certificate says who we are. A secret."""

    def __repr__(self) -> str:
        return f"Access({place(self.server)})"

    def without_secrets(self, text: str) -> str:
        """Return a text of others without any of these credentials that it quotes."""
        scheme, _, told = self.authorization.partition(" ")
        quoted = {self.authorization, told}
        if scheme == "Basic":
            quoted.add(b64decode(told).decode().partition(":")[2])
        for url in filter(None, (self.server, self.proxy)):
            who = urlsplit(url).netloc.rpartition("@")[0]
            password = who.partition(":")[2]
            quoted |= {who, password, unquote(password)}
            quoted.add(b64encode(unquote(who).encode()).decode())
        for one in sorted(quoted, key=len, reverse=True):
            text = text.replace(one, "***") if one else text
        return text


def place(url: str) -> str:
    """Return host and port of a URL: it may also hold a password."""
    return urlsplit(url).netloc.rpartition("@")[2]


class Credentials:
    """Reads credentials, and reads them again. `kubeconfig` None: those of a pod.

    `clock` returns seconds that never go back.
    """

    def __init__(self, kubeconfig: str | None, clock: Callable[[], float]) -> None:
        self.origin = IN_CLUSTER if kubeconfig is None else kubeconfig
        self._kubeconfig = kubeconfig
        self._clock = clock
        self._access: Access | None = None
        self._read_at = 0.0
        self._loader: Any = None
        self._digest = b""
        self._turn = asyncio.Lock()

    async def access(self) -> Access:
        """Return what is good now.

        Raise SourceError where credentials cannot be read now, ConfigError where they say something
        that cannot be right.
        """
        async with self._turn:
            fresh = self._clock() - self._read_at < FRESH_SECONDS
            if self._access is None or not fresh:
                try:
                    self._access = await self._read()
                except SourceError as error:
                    # As client-go: what could be read before goes on, until the server refuses it.
                    if self._access is None:
                        raise
                    log.warning("credentials cannot be read again", why=str(error))
                self._read_at = self._clock()
            return self._access

    def doubt(self, access: Access) -> None:
        """Read them again the next time: the server did not accept these."""
        if access is self._access:
            self._access, self._loader = None, None

    async def _read(self) -> Access:
        library = _library()
        configuration = library.Configuration()
        try:
            async with asyncio.timeout(PLUGIN_SECONDS):
                await self._load(library, configuration)
            return self._made(configuration)
        except TimeoutError as error:
            why = f"the exec plugin took longer than {PLUGIN_SECONDS:.0f} s"
            raise SourceError(f"{self.origin}: {why}") from error
        except SourceError as error:  # of the plugin
            raise SourceError(f"{self.origin}: {error}") from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            why = error.strerror or str(error)
            raise SourceError(f"{self.origin}: {where}{why}") from error
        except YAMLError as error:
            # Its text quotes the line, which may be the token.
            raise ConfigError(self.origin, f"is no YAML: {type(error).__name__}") from None
        except library.ConfigException as error:
            raise SourceError(f"{self.origin}: {_unquoted(str(error))}") from None
        except (
            *(ValueError, TypeError, LookupError, AttributeError, AssertionError),
            *(ArithmeticError, RecursionError),
        ) as error:
            # What the library makes of a file of another shape.
            raise ConfigError(self.origin, f"is no kubeconfig: {type(error).__name__}") from None
        finally:
            # It writes keys and certificates to files, and keeps these until the process ends.
            library.clean_up()

    async def _load(self, library: "_Library", configuration: Any) -> None:
        if self._kubeconfig is None:
            library.in_cluster(
                client_configuration=configuration,
                token_filename=f"{SERVICE_ACCOUNT}/token",
                cert_filename=f"{SERVICE_ACCOUNT}/ca.crt",
            )
            return
        os.stat(self._kubeconfig)  # the library takes a file that is not there for an empty one
        plugin = self._loader is not None and hasattr(self._loader, "exec_plugin_expiry")
        if plugin:  # it is asked again when what it said expires
            await self._loader.load_and_set(configuration)
            return
        self._loader = library.kubeconfig(self._kubeconfig)
        if self._loader.provider:
            # The library would send client secrets to servers whose certificate it does not check.
            why = f"auth-provider {self._loader.provider!r:.64} is not supported; use exec"
            raise ConfigError(self.origin, f"users[].user: {why}")
        await self._loader.load_and_set(configuration)

    def _made(self, told: Any) -> Access:
        authorization = str(told.api_key.get("BearerToken", "")).strip()
        if not authorization.isprintable() or not authorization.isascii():
            raise ConfigError(self.origin, "the token has characters that no token has")
        host = str(told.host).rstrip("/")
        _expect_url(self.origin, "server", host)
        if "@" in urlsplit(host).netloc and authorization:
            why = "has a name or a password, and so has the user; one of them is wrong"
            raise ConfigError(self.origin, f"clusters[].cluster.server: {why}")
        if told.proxy:
            _expect_url(self.origin, "proxy-url", str(told.proxy))
        context = None
        if host.startswith("https://"):
            context = self._context(told)
        return Access(
            server=host,
            ssl=context,
            server_name=told.tls_server_name or None,
            proxy=told.proxy or None,
            authorization=authorization,
        )

    def _context(self, told: Any) -> ssl.SSLContext:
        """Return the context for these files; the one before where their contents are the same."""
        files = (told.ssl_ca_cert, told.cert_file, told.key_file)
        parts = [bytes([told.verify_ssl]), *(_content(path) if path else b"" for path in files)]
        digest = sha256(b"\0".join(parts)).digest()
        if self._access is not None and self._access.ssl is not None and digest == self._digest:
            return self._access.ssl
        try:
            context = ssl.create_default_context(cafile=told.ssl_ca_cert or None)
            # Certificate authorities of clusters do not always have what RFC 5280 wants of them,
            # and Go does not ask for it; Python does since 3.13.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if not told.verify_ssl:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if told.cert_file:
                context.load_cert_chain(told.cert_file, told.key_file)
        except ssl.SSLError as error:
            why = f"certificate or key: {error.reason or 'not readable'}"
            raise ConfigError(self.origin, why) from error
        self._digest = digest
        return context


def _expect_url(origin: str, field: str, url: str) -> None:
    """Raise ConfigError where a URL is none; what it says is not quoted, since it may be secret."""
    try:
        told = urlsplit(url)
        fine = told.scheme in ("https", "http") and bool(told.hostname) and told.port != 0
    except ValueError:
        fine = False
    if not fine or not url.isprintable():
        why = "is no URL of the form https://HOST:PORT"
        raise ConfigError(origin, f"clusters[].cluster.{field}: {why}")


def _unquoted(text: str) -> str:
    """Return what the library says of a file without the parts of it that it quotes, which may be
    a whole user with its token."""
    return re.sub(r"\{.*\}", "{…}", text, flags=re.DOTALL)[:300]


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 20)


class _Library(Struct):
    """What is used of the client library, which has no types of its own."""

    Configuration: Any
    ConfigException: type[Exception]
    kubeconfig: Any
    in_cluster: Any
    clean_up: Any


def _library() -> _Library:
    """Import the client library's reading of credentials, and nothing else of it.

    Its packages import one module for each type of the API: 0.5 s and 63 MB, of which 28 MB are
    left if they are entered without what their ``__init__`` imports (kubernetes_asyncio 36.1,
    https://github.com/tomplus/kubernetes_asyncio/issues/239).
    """
    if _LIBRARY not in sys.modules:
        spec = importlib.util.find_spec(_LIBRARY)
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(f"the Python package {_LIBRARY} is missing")
        root = spec.submodule_search_locations[0]
        for name, path in ((_LIBRARY, root), (f"{_LIBRARY}.client", f"{root}/client")):
            module = ModuleType(name)
            module.__path__ = [path]
            sys.modules[name] = module
        configuration = importlib.import_module(f"{_LIBRARY}.client.configuration")
        # It logs what errors say, without a look at whether they quote credentials.
        logging.getLogger(_LIBRARY).setLevel(logging.CRITICAL + 1)
        client: Any = sys.modules[f"{_LIBRARY}.client"]
        client.Configuration = configuration.Configuration
        client.ApiClient = None
    configuration = importlib.import_module(f"{_LIBRARY}.client.configuration")
    files = importlib.import_module(f"{_LIBRARY}.config.kube_config")
    provider = importlib.import_module(f"{_LIBRARY}.config.exec_provider").ExecProvider
    files.ExecProvider = lambda told: Plugin(provider(told))  # type: ignore[attr-defined]
    pods = importlib.import_module(f"{_LIBRARY}.config.incluster_config")
    return _Library(
        configuration.Configuration,
        files.ConfigException,
        files._get_kube_config_loader_for_yaml_file,
        pods.load_incluster_config,
        files._cleanup_temp_files,
    )
