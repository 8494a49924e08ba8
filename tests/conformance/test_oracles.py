"""O1 to O5: what must hold with no PEFT in sight."""

from __future__ import annotations

import pytest
import torch

from adapters.parts import ActivationScales, KVPrefix, SoftPrompt
from server.engine.request import AdapterRef
from tests.conformance.peft_oracle import prompt_ids
from tests.engine_tools import request, run, teacher_forced, tiny_engine, tokens
from tests.tiny_models import ARCHITECTURES, tiny_model

NUM_PREFIX = 7


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def logprobs_after(model, ids: list[int], count: int) -> torch.Tensor:
    """The base's own log-probabilities of the last `count` positions of `ids`."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)[-count - 1 : -1]


def own_kv(model, ids: list[int]) -> KVPrefix:
    """The base's own keys and values of `ids`, layer by layer."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    return KVPrefix(keys, values)


def check_against_text(model, form, prefix_ids: list[int]) -> None:
    """An adapter that stands for `prefix_ids` gives what the base gives on prefix + input."""
    prompt, continuation = prompt_ids(9), prompt_ids(20)
    expected = logprobs_after(model, [*prefix_ids, *prompt, *continuation], len(continuation))
    engine = tiny_engine(model, read_form=lambda _: form)
    try:
        ref = AdapterRef("a", len(prefix_ids), uses_scales=False)
        got = teacher_forced(engine, prompt, continuation, ref)
    finally:
        engine.close()
    assert (got - expected).abs().max() < 1e-4


def test_o1_a_prefix_of_the_bases_own_kv_is_the_text(model):
    ids = prompt_ids(NUM_PREFIX, seed=3)
    check_against_text(model, own_kv(model, ids), ids)


def test_o2_o3_soft_rows_from_the_vocabulary_are_the_hard_prompt(model):
    """O2 as well: a CPT adapter without a delta is the rows of its context's tokens."""
    ids = prompt_ids(NUM_PREFIX, seed=4)
    # Gemma 3 scales inside its embedding; its rows are what the embedding gives out.
    rows = model.get_input_embeddings()(torch.tensor(ids)).detach()
    check_against_text(model, SoftPrompt(rows), ids)


def test_o4_ones_are_the_base(model):
    engine = tiny_engine(
        model,
        read_form=lambda _: ActivationScales(
            {path: torch.ones(s.in_features) for path, s in engine.spec.linear_modules.items()},
            {path: torch.ones(s.out_features) for path, s in engine.spec.linear_modules.items()},
        ),
    )
    try:
        prompt, continuation = prompt_ids(9), prompt_ids(20)
        got = teacher_forced(engine, prompt, continuation, AdapterRef("a", 0, uses_scales=True))
        base = teacher_forced(engine, prompt, continuation, None)
    finally:
        engine.close()
    assert torch.equal(got, base)


def random_forms(engine) -> dict[str, KVPrefix | SoftPrompt | ActivationScales]:
    """One adapter of each serving form, of unit scale."""
    generator = torch.Generator().manual_seed(5)
    spec = engine.spec

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kv = (spec.num_layers, spec.num_kv_heads, 11, spec.head_dim)
    modules = list(spec.linear_modules.items())
    return {
        "kv": KVPrefix(noise(*kv), noise(*kv)),
        "soft": SoftPrompt(noise(19, spec.hidden_size)),
        "scales": ActivationScales(
            {path: 1 + 0.5 * noise(s.in_features) for path, s in modules[1::3]},
            {path: 1 + 0.5 * noise(s.out_features) for path, s in modules[::3]},
        ),
    }


def test_o5_a_row_is_the_same_in_any_company(model):
    """Mixed adapters, joining and leaving mid-way, in two orders, against each row alone."""
    forms: dict[str, object] = {}
    engine = tiny_engine(model, read_form=lambda digest: forms[digest])
    try:
        forms.update(random_forms(engine))
        refs = [
            None,
            AdapterRef("kv", 11, uses_scales=False),
            AdapterRef("soft", 19, uses_scales=False),
            AdapterRef("scales", 0, uses_scales=True),
        ]
        wanted = {}
        requests = []
        for index in range(12):
            one = request(
                f"r{index}", prompt_ids(3 + 5 * index), refs[index % 4], 6 + 3 * (index % 5)
            )
            requests.append(one)
            wanted.update(run(engine, [one]))
        for order in (requests, requests[::-1]):
            later = list(order[5:])

            def join(step: int, later=later) -> None:
                if later and step % 2 == 0:
                    engine.submit(later.pop())

            got = run(engine, order[:5], on_step=join)
            while later:  # the engine ran dry before everybody had joined
                got.update(run(engine, [later.pop()]))
            assert {k: tokens(v) for k, v in got.items()} == {
                k: tokens(v) for k, v in wanted.items()
            }
    finally:
        engine.close()
