"""The userspace mode: worker processes that listen on the service addresses and forward."""
