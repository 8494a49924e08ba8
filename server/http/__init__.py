"""The listening server: connections, their limits, streams. Independent of routes."""
