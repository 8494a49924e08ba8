"""Bytes mutated from sound seeds, for every reader of what strangers send."""
