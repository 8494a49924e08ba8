"""ASGI middleware: every request passes through these."""
