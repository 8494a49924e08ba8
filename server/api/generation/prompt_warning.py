"""`x-prompt-warning`: a prompt that does not look like those that the adapter was trained on.

The generating routes take a text as it is, as the protocols have it. So a reply has this header, and the
log a line, once for each adapter and caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from fastapi import Request

from server.api.middleware.headers import set_headers
from server.generation.generator import Generator
from server.generation.prompt_form import Difference
from server.services import Services
from server.store.registry import AdapterRecord

log = structlog.get_logger(__name__)

_SENTENCES: dict[Difference, str] = {
    "template": "the prompt is not in the words of the adapter's template, by which it was trained: send "
    '"row", or a prompt by the template of GET /adapters/{name}',
    "white_space": "the prompt ends with white space, which belongs to the output where the adapter was "
    "trained: leave it out",
    "chat": "the adapter was trained on conversations by the base's chat template, and the prompt is none: "
    "use /v1/chat/completions",
}


async def warn_of_prompts(
    request: Request,
    services: Services,
    generator: Generator,
    record: AdapterRecord | None,
    texts: Sequence[str],
) -> None:
    """Set the header and write the line, if a text looks unlike the adapter's training."""
    if record is None:
        return
    who = (record.name, str(record.version), _caller(request))
    if not services.prompt_warnings.is_new(*who):
        return
    found = await generator.differences(record, texts)
    if found is None:
        return
    services.prompt_warnings.add(*who)
    sentence = _SENTENCES[found].format(name=record.name)
    set_headers(request, {"x-prompt-warning": sentence.encode("ascii", "replace").decode()})
    log.warning(
        "prompt_unlike_training",
        adapter=record.name,
        version=record.version,
        difference=found,
        **({} if request.state.caller.key is None else {"key": request.state.caller.key.id}),
    )


def _caller(request: Request) -> str:
    """The caller: its key, or without keys the client's address."""
    key = request.state.caller.key
    if key is not None:
        return str(key.id)
    return "" if request.client is None else request.client.host
