"""The example that ships, in a running server: install the demo adapters, measure them.

Knows the generator and the registry; where the adapters and messages lie is `server.demo`'s.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import uuid
from dataclasses import dataclass

import anyio.to_thread

from server.demo.install import DemoAdapter, DemoMessage, demo_adapters, demo_messages
from server.engine.request import SamplingParams
from server.generation.generator import Generator, Options
from server.services import Services

SHOWN = "complaints"
_MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Accuracy:
    """How many held-out messages an adapter answered exactly, end of sequence included."""

    name: str
    method: str
    num_right: int
    num_messages: int


async def install_demo(services: Services) -> list[DemoAdapter]:
    """Register the demo adapters that are not there yet.

    A name that is taken already is left alone, whatever it means by now.

    Returns:
        The adapters that are new.

    Raises:
        AdapterError: they do not fit the base that is served.
    """
    return await anyio.to_thread.run_sync(_install_missing, services)


def _install_missing(services: Services) -> list[DemoAdapter]:
    registry = services.registry
    taken = {record.name for record in registry.list(limit=100_000)}
    missing = [demo for demo in demo_adapters() if demo.name not in taken]
    for demo in missing:
        with registry.staging_dir() as staged:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(demo.directory / name, staged / name)
            registry.publish(
                demo.name,
                staged,
                services.client.base,
                demo.provenance.metadata(),
                base_names=(services.base_id, services.settings.base),
            )
    return missing


async def measure(generator: Generator, demo: DemoAdapter) -> Accuracy:
    """Let an adapter answer every held-out message, all at once."""
    messages = demo_messages("held_out")
    answers = await asyncio.gather(*(_is_right(generator, demo, one) for one in messages))
    return Accuracy(demo.name, demo.job.method, sum(answers), len(messages))


async def _is_right(generator: Generator, demo: DemoAdapter, message: DemoMessage) -> bool:
    adapter = await generator.resolve(demo.name)
    prompt = await generator.encode_row({"text": message.text}, adapter)
    options = Options(SamplingParams(), max_new_tokens=_MAX_ANSWER_TOKENS)
    request = generator.prepare(prompt, adapter, options, uuid.uuid4().hex)
    generation = generator.submit(request, options)
    async for _ in generation:
        pass
    ended = generation.finish_reason == "eos_token" or not demo.job.append_eos
    return ended and generation.text == demo.job.target_separator + message.label


def curl_line(host: str, port: int, demo: DemoAdapter) -> str:
    """A command line that sends `demo` a message it has not seen."""
    from adapters.template import Template

    message = next(one for one in demo_messages("held_out") if "'" not in one.text)
    body = {"inputs": Template.parse(demo.job.template).render({"text": message.text})}
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    url = f"http://{reachable}:{port}/generate?adapter={demo.name}"
    return (
        f"curl -s {shlex.quote(url)} -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
