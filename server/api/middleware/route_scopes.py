"""Which key may ask which route: the one table. A route that is not in it is nobody's.

A test walks every route of the app and fails when one is missing here, or stands here and is none.
Templates are those of the routes, and are matched against the same path by the same means, so that no
spelling of a path is one route here and another there. Knows no key and no request.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import compile_path

from server.store.key import SCOPES, Scope

Rule = frozenset[Scope]

# Any one of a rule's scopes will do; "admin" will do for all but needs none here.
PUBLIC: Rule = frozenset()
ANY_KEY: Rule = frozenset(SCOPES)
_GENERATE: Rule = frozenset({"generate"})
_LOOK: Rule = frozenset({"generate", "adapters:read"})
_READ: Rule = frozenset({"adapters:read"})
_WRITE: Rule = frozenset({"adapters:write"})
_TRAIN: Rule = frozenset({"train"})
_ADMIN: Rule = frozenset({"admin"})

ACCESS: Mapping[tuple[str, str], Rule] = {
    # the process; nothing of what it serves
    ("GET", "/livez"): PUBLIC,
    ("GET", "/readyz"): PUBLIC,
    ("GET", "/health"): PUBLIC,
    # what is served, in general
    ("GET", "/info"): ANY_KEY,
    ("GET", "/methods"): ANY_KEY,
    ("GET", "/tokenizer_info"): ANY_KEY,
    ("GET", "/"): ANY_KEY,
    ("GET", "/docs"): ANY_KEY,
    ("GET", "/docs/{file}"): ANY_KEY,
    ("GET", "/openapi.json"): ANY_KEY,
    ("GET", "/v1/models"): _LOOK,
    ("GET", "/v1/models/{name:path}"): _LOOK,
    # generation
    ("POST", "/"): _GENERATE,
    ("POST", "/generate"): _GENERATE,
    ("POST", "/generate_stream"): _GENERATE,
    ("POST", "/classify"): _GENERATE,
    ("POST", "/tokenize"): _GENERATE,
    ("POST", "/detokenize"): _GENERATE,
    ("POST", "/v1/completions"): _GENERATE,
    ("POST", "/v1/chat/completions"): _GENERATE,
    # adapters
    ("GET", "/adapters"): _READ,
    ("GET", "/adapters/{name}"): _READ,
    ("GET", "/adapters/{name}/download"): _READ,
    ("POST", "/adapters"): _WRITE,
    ("POST", "/adapters/combine"): _WRITE,
    ("DELETE", "/adapters/{name}"): _WRITE,
    ("POST", "/adapters/{name}/preload"): _WRITE,
    ("POST", "/adapters/{name}/unload"): _WRITE,
    ("POST", "/adapters/{name}/rollback"): _WRITE,
    ("PUT", "/adapters/{name}/aliases/{alias}"): _WRITE,
    # training
    ("GET", "/train"): _TRAIN,
    ("POST", "/train"): _TRAIN,
    ("GET", "/train/{job_id}"): _TRAIN,
    ("DELETE", "/train/{job_id}"): _TRAIN,
    ("GET", "/train/{job_id}/events"): _TRAIN,
    ("GET", "/train/{job_id}/log"): _TRAIN,
    ("POST", "/train/{job_id}/cancel"): _TRAIN,
    ("GET", "/v1/files"): _TRAIN,
    ("POST", "/v1/files"): _TRAIN,
    ("GET", "/v1/files/{file_id}"): _TRAIN,
    ("DELETE", "/v1/files/{file_id}"): _TRAIN,
    ("GET", "/v1/files/{file_id}/content"): _TRAIN,
    ("GET", "/v1/fine_tuning/jobs"): _TRAIN,
    ("POST", "/v1/fine_tuning/jobs"): _TRAIN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): _TRAIN,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): _TRAIN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): _TRAIN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): _TRAIN,
    # what shows or moves everybody's, or reads folders of the server
    ("GET", "/metrics"): _ADMIN,
    ("POST", "/drain"): _ADMIN,
    ("DELETE", "/drain"): _ADMIN,
    ("POST", "/v1/load_lora_adapter"): _ADMIN,
    ("POST", "/v1/unload_lora_adapter"): _ADMIN,
}
# Answered where a client asks for HTML; for all others the method is not there.
BROWSERS_ONLY = frozenset({("GET", "/")})
_PATTERNS = {template: compile_path(template)[0] for _, template in ACCESS}


def rule_of(method: str, path: str) -> Rule | None:
    """Who may ask this; None is nobody, since no route takes it. HEAD is GET without its body."""
    return rules_of(path).get("GET" if method == "HEAD" else method)


def allowed_methods(path: str) -> list[str]:
    """The methods that `Allow` lists for a path: those that every client may use, sorted."""
    return sorted(method for method in rules_of(path) if (method, path) not in BROWSERS_ONLY)


def rules_of(path: str) -> dict[str, Rule]:
    """The rules of a path (`scope["path"]`, and nothing but it) by method."""
    return {
        method: rule
        for (method, template), rule in ACCESS.items()
        if _PATTERNS[template].fullmatch(path)
    }
