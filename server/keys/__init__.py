"""Keys: who asks, what they may do, and how much of it.

    key      a key: its text, its digest, its scopes, its adapters
    store    keys in the data directory's database
    ring     the same keys in memory, never older than a moment
    quotas   requests and tokens of a key, counted
    caller   the key that a request came with, for whatever runs on its behalf

Nothing here knows HTTP; `server.api.auth` stands at the door.
"""
