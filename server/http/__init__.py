"""How the server listens: connections, limits on them, streams. Knows no route."""
