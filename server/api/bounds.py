"""Bounds of bodies that are settings.

`AtMost` marks a field of a schema and reads the setting when a body is checked and when the OpenAPI page is
made. FastAPI hands a schema's validators nothing but the value, so the settings reach them in a context
variable, which `HoldLimits` sets; everything else is passed its limits. Knows no route.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config.limits import Limits

Kind = Literal["array", "object", "string"]

_TYPES: Mapping[str, type[Sized]] = {"array": list, "object": dict, "string": str}
_NAMES = {"array": "List", "object": "Dictionary"}
_KEYWORDS = {"array": "maxItems", "object": "maxProperties", "string": "maxLength"}


_limits: ContextVar[Limits | None] = ContextVar("limits", default=None)
_DEFAULT = Limits()


@contextmanager
def limited(by: Limits) -> Iterator[None]:
    """Hold the bodies that are checked inside to these limits."""
    token = _limits.set(by)
    try:
        yield
    finally:
        _limits.reset(token)


@dataclass(frozen=True)
class AtMost:
    """Marks a field: a list, an object or a text of no more than a setting allows.

    The length is looked at first: a list that is too long costs nothing.

    Attributes:
        setting: a field of `Limits`.
        kind: what is counted; values of other kinds pass.
    """

    setting: str
    kind: Kind = "array"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The field's schema behind the check."""
        return core_schema.no_info_before_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The field's JSON schema with the bound."""
        made = handler(schema)
        for one in (made, *made.get("anyOf", ())):
            if one.get("type") == self.kind:
                one[_KEYWORDS[self.kind]] = self._most
        return made

    def checked(self, value: Any) -> Any:
        """The value.

        Raises:
            PydanticKnownError: it is too long.
        """
        most = self._most
        if not isinstance(value, _TYPES[self.kind]) or len(value) <= most:
            return value
        if self.kind == "string":
            raise PydanticKnownError("string_too_long", {"max_length": most})
        context = {"field_type": _NAMES[self.kind], "max_length": most}
        raise PydanticKnownError("too_long", {**context, "actual_length": len(value)})

    @property
    def _most(self) -> int:
        most: int = getattr(_limits.get() or _DEFAULT, self.setting)
        return most


class HoldLimits:
    """Middleware: holds the bodies of requests to the limits of this server."""

    def __init__(self, app: ASGIApp, by: Limits) -> None:
        self._app = app
        self._by = by

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app."""
        with limited(self._by):
            await self._app(scope, receive, send)
