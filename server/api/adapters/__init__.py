"""Routes that manage adapters."""
