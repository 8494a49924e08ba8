"""Everything at once on one real server, for a while: see `tests.soak.run`."""
