"""A long run of the service beside a database in trouble, bad handlers and hostile clients."""
