"""A token's bytes, for tokenizers of both families: their tokens' bytes make the text again."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from server.text.tokenizer import TextTokenizer
from tests.server.http_server import byte_level_tokenizer

TEXT = "Ü the tweet — 漢字 🙂 <0x41> Ġ is"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces are written ▁, unknown characters fall back to byte tokens."""
    words = ["▁", "a", "t", "h", "e", "▁t", "▁the", "th", "the", "w", "i", "s", "▁a"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "t"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    backend = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("make", "before"), [(byte_level_tokenizer, ""), (sentencepiece_like, " ")]
)
def test_the_bytes_of_all_tokens_are_the_text(make, before):
    tokenizer = TextTokenizer(make())
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == (before + TEXT).encode()
    # asked again, from memory
    assert b"".join(map(tokenizer.token_bytes, ids)) == (before + TEXT).encode()


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_like])
def test_a_token_of_half_a_character_and_a_special_one(make):
    tokenizer = TextTokenizer(make())
    parts = [tokenizer.token_bytes(one) for one in tokenizer.encode("漢", add_special_tokens=False)]
    assert b"".join(parts).endswith("漢".encode())
    assert any(part not in (b" ", "漢".encode()) for part in parts)
    assert tokenizer.token_bytes(2) == b"</s>"


def test_a_space_at_the_front_is_kept():
    fast = sentencepiece_like()
    tokenizer = TextTokenizer(fast)
    the = fast.convert_tokens_to_ids("▁the")
    assert tokenizer.token_text(the) == "the"
    assert tokenizer.token_bytes(the) == b" the"
