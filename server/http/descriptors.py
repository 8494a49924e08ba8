"""Raises this process's limit of open files for its connections. Independent of sockets."""

from __future__ import annotations

import resource

import structlog

log = structlog.get_logger(__name__)

# Descriptors for databases, pipes, libraries, files and connections above the limit.
NUM_OTHERS = 256


def room_for(connections: int) -> int:
    """Raise the soft limit of descriptors as far as needed and allowed.

    Returns:
        How many connections fit: `connections`, if the hard limit allows.
    """
    needed = connections + NUM_OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed:
        return connections
    fitting = max(1, soft - NUM_OTHERS)
    log.warning("few_descriptors", limit=soft, connections=fitting, wanted=connections)
    return fitting
