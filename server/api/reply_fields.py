"""The base of reply models, and their fields: a description and an example each.

The OpenAPI page is made of these models. Knows no route.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _iso(at: Any) -> Any:
    return at.isoformat() if isinstance(at, datetime) else at


def _unix(at: Any) -> Any:
    return int(at.timestamp()) if isinstance(at, datetime) else at


# Points in time: ISO 8601 in UTC, and seconds since 1970.
Moment = Annotated[str, BeforeValidator(_iso)]
UnixTime = Annotated[int, BeforeValidator(_unix)]


class ReplyModel(BaseModel):
    """A reply or a part of one. Later versions may add fields, and clients should expect that."""

    model_config = ConfigDict(
        extra="allow",
        from_attributes=True,
        json_schema_serialization_defaults_required=True,
        protected_namespaces=(),
    )


def shows(example: Any, description: str) -> Any:
    """A field that is always present; also the annotation of a TypedDict's key."""
    return Field(description=description, examples=[example])


def may_show(example: Any, description: str) -> Any:
    """A field of a model that is left out of the reply while it is None."""
    return Field(None, description=description, examples=[example], exclude_if=_is_none)


def fixed(value: Any, description: str) -> Any:
    """A field of a model with one value."""
    return Field(value, description=description, examples=[value])


def _is_none(value: Any) -> bool:
    return value is None
