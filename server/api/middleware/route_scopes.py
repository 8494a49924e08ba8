"""The scopes that each route requires. Routes missing from the table are denied.

A test compares the table with the routes of the app. Templates are matched against the same path by the
same code as the routes, so that no spelling of a path can match different routes. Independent of keys
and requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from starlette.routing import compile_path

from server.store.key import SCOPES, Scope

Rule = frozenset[Scope]

# Any one of a rule's scopes suffices; "admin" suffices for all and is not listed.
PUBLIC: Rule = frozenset()
ANY_KEY: Rule = frozenset(SCOPES)
_GENERATE: Rule = frozenset({"generate"})
_LOOK: Rule = frozenset({"generate", "adapters:read"})
_READ: Rule = frozenset({"adapters:read"})
_WRITE: Rule = frozenset({"adapters:write"})
_TRAIN: Rule = frozenset({"train"})
_ADMIN: Rule = frozenset({"admin"})

ACCESS: Mapping[tuple[str, str], Rule] = {
    # the process, not what it serves
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
    ("POST", "/v1/responses"): _GENERATE,
    ("GET", "/v1/responses/{response_id}"): _GENERATE,
    ("DELETE", "/v1/responses/{response_id}"): _GENERATE,
    ("POST", "/v1/embeddings"): _GENERATE,
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
    ("DELETE", "/adapters/{name}/aliases/{alias}"): _WRITE,
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
    # what concerns all tenants, or reads folders of the server
    ("GET", "/metrics"): _ADMIN,
    ("POST", "/drain"): _ADMIN,
    ("DELETE", "/drain"): _ADMIN,
    ("POST", "/v1/load_lora_adapter"): _ADMIN,
    ("POST", "/v1/unload_lora_adapter"): _ADMIN,
}
_PATTERNS = {template: compile_path(template)[0] for _, template in ACCESS}


def rule_of(method: str, path: str) -> Rule | None:
    """The scopes for a request; None if there is no such route. HEAD is GET without its body."""
    return rules_of(path).get("GET" if method == "HEAD" else method)


def allowed_methods(path: str) -> list[str]:
    """The methods that `Allow` lists for a path, sorted."""
    return sorted(rules_of(path))


def template_of(path: str) -> str | None:
    """The first template of the table that a path fits, whatever the method; None if none does."""
    fitting = (one for _, one in ACCESS if _PATTERNS[one].fullmatch(path) is not None)
    return next(fitting, None)


def is_one_of(routes: Collection[tuple[str, str]], method: str, path: str) -> bool:
    """Whether a request is for one of these entries of the table."""
    return any(
        method == one and _PATTERNS[template].fullmatch(path) is not None
        for one, template in routes
    )


def rules_of(path: str) -> dict[str, Rule]:
    """The rules of a path (exactly `scope["path"]`) by method."""
    return {
        method: rule
        for (method, template), rule in ACCESS.items()
        if _PATTERNS[template].fullmatch(path)
    }
