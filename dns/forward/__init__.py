"""Names of others: upstreams are asked, replies are cached, special names are answered here."""
