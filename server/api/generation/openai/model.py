"""What `model` means on OpenAI's routes: an adapter, or the base. Knows no prompt and no output."""

from __future__ import annotations

from fastapi import Request

from adapters.errors import AdapterNotFound, NameInvalid, VersionNotFound
from server.api.adapter_choice import only_query, refuse_stray_adapters
from server.api.adapter_headers import name_adapter
from server.api.error_replies import quoted
from server.api.generation.openai.bodies import OpenAIBody
from server.api.middleware.headers import note_ignored
from server.api.schemas import set_extras
from server.errors import Contradiction
from server.services import Services
from server.store.registry import AdapterRecord

# What TGI's documentation and huggingface_hub write where a server has one model only.
BASE_NICKNAMES = ("tgi", "dummy")


async def chosen_model(request: Request, services: Services, name: str) -> AdapterRecord | None:
    """The adapter that `model` names; None is the base. The reply's headers will say which.

    `tgi` and `dummy` are the base too, unless adapters are called so.

    Raises:
        Contradiction: an empty name.
        AdapterNotFound, VersionNotFound: nothing of that name is served.
        AdapterCorrupt, BaseMismatch: it cannot be served; never the base instead.
    """
    if not name.strip():
        raise Contradiction(
            "model is empty; name an adapter or the base",
            field="model",
            expected=f"an adapter, or {services.base_id}",
            came=quoted(name),
        )
    try:
        record = await services.need_generator().resolve(name)
    except (AdapterNotFound, NameInvalid) as error:
        if name not in BASE_NICKNAMES:
            raise _not_served(services, name, error) from None
        record = None
    except VersionNotFound as error:
        raise VersionNotFound(error.message, field="model", came=error.came) from None
    name_adapter(request, services, record)
    return record


def note_extras(request: Request, body: OpenAIBody) -> None:
    """Refuse query parameters and fields that look like adapters; name the other unknown ones.

    Raises:
        UnknownParameter: a query parameter.
        Contradiction: a field that looks like an adapter.
    """
    only_query(request)
    refuse_stray_adapters(body.model_extra or {}, place="model")
    fields = {name: name for name in type(body).model_fields}
    note_ignored(request, set_extras(body), fields)


def _not_served(
    services: Services, name: str, error: AdapterNotFound | NameInvalid
) -> AdapterNotFound:
    # What cannot be an adapter's name is a model that is not here, as any other is.
    expected = error.expected if isinstance(error, AdapterNotFound) else None
    reason = error.message if expected else f"there is no adapter {quoted(name)}"
    rest = " The" if reason.endswith("?") else "; the"
    return AdapterNotFound(
        f"{reason}{rest} base is {services.base_id!r}, and GET /v1/models lists what is served",
        field="model",
        expected=expected or "an adapter or the base",
        came=quoted(name),
    )
