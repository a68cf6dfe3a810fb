"""What runs in a worker process: it has listeners, and connections to endpoints; no privileges."""
