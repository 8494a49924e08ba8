"""What the tests of training plans share: a real tokenizer, a base without weights, a request."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

from adapters.base_model import BaseModelSpec, LinearSpec
from adapters.training.examples import Examples, from_lines, to_lines
from adapters.training.job import TrainingJob, TrainingRequest
from adapters.training.plan import Plan, make_plan
from server.text.tokenizer import TextTokenizer
from tests.server.http_server import byte_level_tokenizer

TEMPLATE = "Tweet text : {text} Label :"
LABELS = ["complaint", "no complaint"]
ROWS: list[dict[str, Any]] = [
    {"text": "the tweet is", "label": "complaint", "ID": 1},
    {"text": "a naïve 漢字 🙂", "label": "no complaint", "ID": 2},
    {"text": "=1+1", "label": "no complaint", "ID": 3},
    {"text": "</s> typed <s>", "label": "complaint", "ID": 4},
    {"text": "all at once, kosten 5 €", "label": "no complaint", "ID": 5},
    {"text": "no", "label": "complaint", "ID": 6},
]


@cache
def tokenizer(*, bos: bool = False) -> TextTokenizer:
    return TextTokenizer(byte_level_tokenizer(bos=bos))


@cache
def spec(max_positions: int = 512) -> BaseModelSpec:
    modules = {}
    for layer in range(2):
        path = f"model.layers.{layer}"
        modules |= {
            f"{path}.self_attn.k_proj": LinearSpec("linear", 32, 16),
            f"{path}.self_attn.v_proj": LinearSpec("linear", 32, 16),
            f"{path}.mlp.down_proj": LinearSpec("linear", 48, 32),
        }
    return BaseModelSpec(
        model_type="llama",
        digest="digest",
        dtype="float32",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=tokenizer().vocab_size,
        max_positions=max_positions,
        linear_modules=modules,
        kv_width="config",
    )


def request(**fields: Any) -> TrainingRequest:
    given = {"adapter": "a", "method": "ia3", "template": TEMPLATE, "target": "label", **fields}
    return TrainingRequest.model_validate(given)


def plan(
    rows: list[dict[str, Any]] | None = None,
    *,
    encoder: TextTokenizer | None = None,
    base: BaseModelSpec | None = None,
    **fields: Any,
) -> Plan:
    return make_plan(
        request(**fields),
        ROWS if rows is None else rows,
        encoder or tokenizer(),
        base or spec(),
        base_name="tiny",
    )


def stored_and_read(job: TrainingJob, made: Plan) -> Examples:
    """A plan's examples as a worker reads them."""
    return from_lines(io.BytesIO("".join(to_lines(made.examples)).encode()), job)
