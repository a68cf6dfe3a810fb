"""The Kubernetes API server as a source: a list and then a watch of each kind, made into events.

`source.py` puts it together, `following.py` follows one kind. Pure are `lines.py`, `wire.py`,
`known.py`, `pace.py` and `resources.py`; the network is `api.py`'s, and the client library that
reads credentials is known to `credentials.py` alone.
"""
