"""The source that a configuration means.

Lives here: the choice, and that what is not used is not imported.
"""

import os

from vipd.proxy.config import Config
from vipd.proxy.errors import ConfigError
from vipd.proxy.sources.protocol import Source

_SAYS_CLUSTER = "KUBERNETES_SERVICE_HOST"


def source(config: Config, *, node: bool = True) -> Source:
    """Return the source. Raise ConfigError where none is named, SourceError where it is not there.

    `node` says whether this node's own object is of use. Standard input is read here.
    """
    if config.manifests:
        from vipd.proxy.sources.manifests import ManifestSource

        return ManifestSource(config.manifests)
    if not config.kubeconfig and _SAYS_CLUSTER not in os.environ:
        why = "say where the services are: --manifests DIR or --kubeconfig FILE (or run in a pod)"
        raise ConfigError("--manifests", why)
    from vipd.proxy import undumped
    from vipd.proxy.sources.kubernetes.resources import Wanted
    from vipd.proxy.sources.kubernetes.source import KubernetesSource

    undumped.keep_from_dumps()
    wanted = Wanted(names=bool(config.dns.listen), pods=config.dns.pods == "verified")
    name = config.node.node_name if node else ""
    return KubernetesSource(config.kubeconfig or None, name, wanted)
