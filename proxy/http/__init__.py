"""What the daemon answers over HTTP: health, metrics, the status page, health-check node ports.

`service.py` puts it together. `health.py` says how the node is, `health_ports.py` which services
have a port of their own for that, `pages.py` what stands where on the metrics server
(`status_page.py`, `configz.py`, `zpages.py`). `listeners.py` opens sockets, `server.py` alone knows
aiohttp, and `crowd.py` keeps strangers from taking everything. Nothing is imported before something
listens.
"""
