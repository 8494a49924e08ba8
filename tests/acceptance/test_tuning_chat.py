"""Conversations to train on, on the real base: its own chat template and its special tokens."""

from __future__ import annotations

import pytest

from adapters.training.plan import make_plan
from server.api.training.openai.conversations import turns
from server.base.tokenizer import load_tokenizer
from server.text.tokenizer import TextTokenizer, read_eos_token_ids
from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.adapters.training.jobs import request, spec

MESSAGES = [
    {"role": "user", "content": "  My parcel never came.\n"},
    {"role": "assistant", "content": "Sorry <|im_end|> indeed."},
    {"role": "user", "content": "漢字 🙂"},
    {"role": "assistant", "content": "\nThank you."},
]


@needs_base
@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_those_of_transformers(system):
    fast = load_tokenizer(BASE_DIR)
    tokenizer = TextTokenizer(fast, read_eos_token_ids(BASE_DIR))
    before = [] if system is None else [{"role": "system", "content": system}]
    messages = before + MESSAGES
    found = list(turns({"messages": messages}, "line 1", 1, tokenizer))
    rows = [{"prompt": turn.prompt, "completion": turn.answer} for turn in found]
    fields = {"template": "{prompt}", "target": "completion", "target_separator": ""}
    plan = make_plan(
        request(**fields), rows, tokenizer, spec(8192), base_name="real", prompts="chat"
    )
    for example, length in zip(plan.examples.train, (1, 3), strict=True):
        history, answer = messages[: len(before) + length], messages[len(before) + length]
        prompt = fast.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
        assert list(example.prompt_ids) == prompt
        words = fast(answer["content"], add_special_tokens=False)["input_ids"]
        # The names of special tokens in an answer are text: it could not be generated otherwise.
        plain = answer["content"] if "<|" not in answer["content"] else None
        assert plain is None or list(example.target_ids) == [*words, fast.eos_token_id]
        assert example.target_ids.count(fast.eos_token_id) == 1
