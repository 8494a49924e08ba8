"""What was probably meant by a path or a method that does not exist, by the table of routes.

Never repeats the path: it is whatever came. Independent of requests.
"""

from __future__ import annotations

import difflib

from starlette.exceptions import HTTPException

from adapters.field_errors import listed
from server.api.middleware.route_scopes import ACCESS, allowed_methods, template_of

_OPENAI = "/v1"
# Longer ones are no slips of the keyboard.
_MAX_CHARACTERS = 200
_ALIKE = 0.75
_TEMPLATES = tuple(dict.fromkeys(template for _, template in ACCESS))


def no_route(path: str) -> HTTPException:
    """The refusal of a path that has no route, or has routes of other methods only."""
    methods = allowed_methods(path)
    if methods:
        return HTTPException(405, no_such_method(path), {"allow": ", ".join(methods)})
    return HTTPException(404, no_such_path(path))


def explained(error: HTTPException, path: str) -> HTTPException:
    """The framework's refusal of a path or a method in our words; any other error as it is."""
    # A route itself answers 404 for what it does not have.
    if error.status_code == (405 if allowed_methods(path) else 404):
        return no_route(path)
    return error


def no_such_path(path: str) -> str:
    """The sentence for a path without a route."""
    said = "Not Found: there is no such path"
    if len(path) > _MAX_CHARACTERS:
        return said
    if path.startswith(_OPENAI + "/"):
        if meant := template_of(path.removeprefix(_OPENAI)):
            end = " (an OpenAI client's base_url ends in /v1 once)" if _is_openai(meant) else ""
            return f"{said}; did you mean {meant}?{end}"
    elif (meant := template_of(_OPENAI + path)) and meant.count("{") == 0:
        return f"{said}; did you mean {meant}? (an OpenAI client's base_url ends in /v1)"
    near = _near(path)
    return (
        f"{said}; did you mean {near}?" if near else f"{said}; GET /openapi.json lists the routes"
    )


def no_such_method(path: str) -> str:
    """The sentence for a path that has routes of other methods."""
    return f"Method Not Allowed: this path takes {listed(allowed_methods(path))}"


def _is_openai(template: str) -> bool:
    return template.startswith(_OPENAI + "/")


def _near(path: str) -> str | None:
    """The template that fits but for a slash at its end, or whose letters are alike."""
    trimmed = path.rstrip("/")
    if fits := template_of(trimmed):
        return fits
    first, slash, rest = trimmed.removeprefix("/").partition("/")
    firsts = {template.split("/")[1]: None for template in _TEMPLATES}
    for close in difflib.get_close_matches(first, [*firsts], n=1, cutoff=_ALIKE):
        if fits := template_of(f"/{close}{slash}{rest}"):
            return fits
    plain = [template for template in _TEMPLATES if "{" not in template]
    near = difflib.get_close_matches(trimmed, plain, n=1, cutoff=_ALIKE)
    return near[0] if near else None
