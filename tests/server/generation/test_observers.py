"""What watchers of generations are told, by a real engine: everything once, and when it happened."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from adapters.errors import AdapterCorrupt
from server.app import load_text_tokenizer
from server.engine.client import EngineClient, EngineOverloaded, EngineUnavailable, RequestFailed
from server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from server.generation.generator import Generation, Generator, Options, adapter_ref
from server.store.caller import Caller
from server.store.registry import Registry
from tests.server.conftest import make_settings
from tests.server.http_server import save_prefix_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Told:
    """One generation, as it was told."""

    request: GenerationRequest
    first: list[tuple[float, float | None]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ends: list[tuple[str, float, str | None]] = field(default_factory=list)

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        assert not self.ends
        self.first.append((seconds, queue_seconds))

    def token(self, seconds: float) -> None:
        assert self.first
        assert not self.ends
        self.gaps.append(seconds)

    def ended(self, how: str, seconds: float, code: str | None) -> None:
        self.ends.append((how, seconds, code))


@dataclass
class Recorder:
    told: list[Told] = field(default_factory=list)
    refusals: list[tuple[str | None, str]] = field(default_factory=list)

    def began(self, request: GenerationRequest, _caller: Caller, /) -> Told:
        self.told.append(Told(request))
        return self.told[-1]

    def refused(self, adapter: str | None, code: str) -> None:
        self.refusals.append((adapter, code))


@pytest.fixture(scope="module")
def settings(tiny_base, tmp_path_factory):
    home = tmp_path_factory.mktemp("watched")
    return make_settings(
        tiny_base, home / "data", max_running=2, max_queued=2, max_queued_per_adapter=4
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def everything(settings):
    settings.data_dir.mkdir()
    registry = Registry(settings.data_dir)
    client = EngineClient(settings.engine_config())
    await client.start()
    yield client, registry, load_text_tokenizer(settings)
    await client.stop()
    registry.close()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def generator(everything, recorder):
    # Two of them: whoever watches must not take anything from the others.
    return Generator(*everything, "tiny-base", [recorder, Recorder()])


async def begin(generator, tokens: int = 5, stop=(), adapter=None) -> Generation:
    sampling = SamplingParams(ignore_eos=True)
    options = Options(sampling, max_new_tokens=tokens, stop=tuple(stop))
    prompt = await generator.encode("the tweet is a complaint")
    number = time.monotonic_ns()
    return generator.submit(generator.prepare(prompt, adapter, options, str(number)), options)


async def read(generation: Generation) -> str:
    async for _ in generation:
        pass
    return generation.text


async def test_a_whole_generation(generator, recorder):
    generation = await begin(generator)
    await read(generation)
    (told,) = recorder.told
    assert told.first == [(generation.first_token_seconds, generation.queue_seconds)]
    assert len(told.gaps) == 4
    ((how, seconds, code),) = told.ends
    assert (how, code) == ("length", None)
    assert seconds == pytest.approx(told.first[0][0] + sum(told.gaps))
    generation.abort()
    assert len(told.ends) == 1


async def test_a_stop_string(generator, recorder):
    text = await read(await begin(generator, 12))
    await read(await begin(generator, 12, stop=[text[4:6]]))
    assert [told.ends[0][0] for told in recorder.told] == ["length", "stop"]


async def test_a_slow_reader_is_no_slow_engine(generator, recorder):
    generation = await begin(generator, 6)
    async for _ in generation:
        await asyncio.sleep(0.2)
    (told,) = recorder.told
    assert told.ends[0][1] < 5 * 0.2  # read over more than a second, made long before


@pytest.mark.parametrize("num_read", [0, 3])
async def test_who_leaves_is_told_once(generator, recorder, num_read):
    generation = await begin(generator, 400)
    pieces = aiter(generation)
    for _ in range(num_read):
        await anext(pieces)
    generation.abort()
    generation.abort()
    await pieces.aclose()
    (told,) = recorder.told
    assert [(how, code) for how, _, code in told.ends] == [("abort", None)]
    assert len(told.first) + len(told.gaps) == num_read


async def test_who_is_cancelled_leaves(generator, recorder):
    generation = await begin(generator, 400)
    reading = asyncio.ensure_future(read(generation))
    while not recorder.told[0].gaps:
        await asyncio.sleep(0.005)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert [how for how, _, _ in recorder.told[0].ends] == ["abort"]


async def test_a_failure_in_the_engine(generator, recorder):
    missing = AdapterRef("0" * 64, 4, uses_scales=False, name="gone", version=2)
    request = GenerationRequest("lost", (5, 6, 7), adapter=missing)
    generation = generator.submit(request, Options(SamplingParams()))
    with pytest.raises(RequestFailed) as failure:
        await read(generation)
    (told,) = recorder.told
    assert told.request.adapter.name == "gone"
    assert failure.value.code.startswith("adapter_")
    assert [(how, code) for how, _, code in told.ends] == [("error", failure.value.code)]


async def test_a_full_queue_is_a_refusal_and_no_generation(generator, recorder):
    generations = [await begin(generator, 400) for _ in range(4)]
    with pytest.raises(EngineOverloaded):
        await begin(generator)
    assert recorder.refusals == [(None, "overloaded")]
    assert len(recorder.told) == 4
    for generation in generations:
        generation.abort()
    assert {told.ends[0][0] for told in recorder.told} == {"abort"}


async def test_adapters_go_by_name_and_version(generator, recorder, everything, tmp_path):
    _, registry, _ = everything
    folder = save_prefix_adapter(tmp_path / "a", seed=4)
    (folder / "README.md").unlink()
    base = everything[0].base
    record = registry.publish("named", folder, base=base).record
    await read(await begin(generator, adapter=await generator.resolve("named@1")))
    ref = recorder.told[0].request.adapter
    assert (ref.name, ref.version) == ("named", 1)
    assert ref == adapter_ref(record)
    registry.mark_corrupt(record.digest)
    with pytest.raises(AdapterCorrupt):
        await generator.resolve("named@1")
    assert recorder.refusals == [("named", "adapter_corrupt")]


async def test_an_engine_that_is_not_there(everything, recorder, settings):
    running, registry, tokenizer = everything
    stopped = EngineClient(settings.engine_config())
    stopped.base, stopped.room = running.base, running.room
    generator = Generator(stopped, registry, tokenizer, "tiny-base", [recorder])
    with pytest.raises(EngineUnavailable):
        await begin(generator)
    assert recorder.refusals == [(None, "engine_unavailable")]
    assert stopped.pid is None
