"""Fields of documented replies: a description and an example each. Knows no route."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """What a reply, or a part of one, holds; clients should expect more fields in later versions."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


def shows(example: Any, description: str) -> Any:
    """A field that is always there."""
    return Field(description=description, examples=[example])


def may_show(example: Any, description: str) -> Any:
    """A field that is there only where the description says so."""
    return Field(None, description=description, examples=[example])
