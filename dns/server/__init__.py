"""The DNS server: processes that answer on sockets, and what starts, feeds and watches them."""
