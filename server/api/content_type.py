"""What a `Content-Type` header says a body is.

The media type is compared, never searched for: `text/plain;application/json` is plain text, which a web
page may send without asking. Knows no route.
"""

from __future__ import annotations


def media_type(content_type: str) -> str:
    """The media type without parameters, in lower case; "" if the header is empty."""
    return content_type.partition(";")[0].strip().lower()


def is_json(content_type: str) -> bool:
    """Whether a body is JSON: `application/json` or `application/...+json`, as FastAPI reads them."""
    kind, _, subtype = media_type(content_type).partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
