"""Configs that are not PEFT's, recognised by their fields: what they are, and how to make a good one.

People send whatever lies beside their weights under the name `adapter_config.json`. Plain objects in,
sentences out: independent of methods, files and errors.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

HOW_TO_SAVE = (
    "a PEFT adapter is what save_pretrained(...) of a model from get_peft_model(...) writes"
)

_Raw = Mapping[str, Any]


def _any_of(*names: str) -> Callable[[_Raw], bool]:
    return lambda raw: any(name in raw for name in names)


def _all_of(*names: str) -> Callable[[_Raw], bool]:
    return lambda raw: all(name in raw for name in names)


def _is_adapter_hub(raw: _Raw) -> bool:
    inner, version = raw.get("config"), raw.get("version")
    by_version = isinstance(version, str) and version.startswith("adapter")
    by_shape = isinstance(inner, Mapping) and bool(
        {"architecture", "prefix_length", "mh_adapter", "reduction_factor", "prompt_length"}
        & inner.keys()
    )
    return by_version or by_shape or _any_of("model_class", "config_id")(raw)


def _is_wrapped(raw: _Raw) -> bool:
    return any(isinstance(value, Mapping) and "peft_type" in value for value in raw.values())


# From the most special to the most general: the first that fits is named.
_KINDS: tuple[tuple[Callable[[_Raw], bool], str], ...] = (
    (
        _is_wrapped,
        "this file holds the config one level down, as `model.peft_config` does; "
        "write that inner object to adapter_config.json",
    ),
    (
        lambda raw: "pre_seq_len" in raw,
        "this is a model's config.json, of ChatGLM's P-Tuning v2 (`pre_seq_len`): its prefix encoder is "
        "part of the model and no PEFT checkpoint; train the prefix here (method prefix_tuning) or with "
        "PEFT's PrefixTuningConfig",
    ),
    (
        _is_adapter_hub,
        "this is a config of AdapterHub's `adapters` library (adapter-transformers), whose weights are "
        "no PEFT checkpoint; train the adapter here or with PEFT",
    ),
    (
        _any_of("swift_type"),
        "this is a config of ModelScope's SWIFT; export the adapter in PEFT's form "
        "(`Swift.save_to_peft_format`)",
    ),
    (
        _any_of("num_prefix_tokens", "prefix_attention_hidden_size", "postprocess_past_key_value"),
        "this is a config of PaddleNLP's prefix tuning, whose weights are no PEFT checkpoint; "
        "train the prefix here or with PEFT",
    ),
    (
        _any_of("delta_type", "opendelta_version"),
        "this is a config of OpenDelta, whose weights are no PEFT checkpoint; train the adapter here or "
        "with PEFT",
    ),
    (
        _any_of("fine_tune_type", "lora_parameters", "lora_layers"),
        "this is an adapter config of MLX (mlx-lm), whose weights are no PEFT checkpoint",
    ),
    (
        _any_of("zero_optimization", "train_micro_batch_size_per_gpu", "zero_stage"),
        "this is a config of DeepSpeed, of a training run",
    ),
    (
        _any_of("finetuning_type", "cutoff_len", "dataset_dir"),
        "these are the arguments of a LLaMA-Factory run; the adapter's config lies in its output_dir",
    ),
    (
        _any_of("micro_batch_size", "sequence_len", "datasets", "val_set_size"),
        "this is a config of a training run (axolotl or alike); "
        "the adapter's config lies in its output folder",
    ),
    (
        _any_of("per_device_train_batch_size", "num_train_epochs", "output_dir", "training_args"),
        "these are the arguments of a training run (transformers or trl); "
        "the adapter's config lies in its output_dir",
    ),
    (
        _any_of("best_model_checkpoint", "log_history", "global_step"),
        "this is a trainer_state.json, of a training run",
    ),
    (
        _any_of("tokenizer_class", "added_tokens_decoder", "model_max_length"),
        "this is a tokenizer's config",
    ),
    (
        _any_of("_from_model_config", "do_sample", "max_new_tokens"),
        "this is a generation_config.json",
    ),
    (
        lambda raw: (
            _any_of("architectures", "num_hidden_layers", "n_layer", "hidden_size")(raw)
            or _all_of("model_type", "vocab_size")(raw)
        ),
        "this is a model's config.json",
    ),
    (
        _any_of("weight_map"),
        "this is the index of sharded weights",
    ),
)


def what_it_is(raw: Mapping[str, Any]) -> str | None:
    """What a config without `peft_type` is, and how to make a PEFT adapter; None if unknown."""
    for fits, sentence in _KINDS:
        if fits(raw):
            return f"{sentence}; {HOW_TO_SAVE}"
    return None


# Files that lie beside other programs' weights -> what they are. Compared in lower case.
_FILES: tuple[tuple[str, str], ...] = (
    ("pytorch_adapter.bin", "pytorch_adapter.bin is AdapterHub's, which is no PEFT checkpoint"),
    (
        "pytorch_model_head.bin",
        "pytorch_model_head.bin is AdapterHub's, which is no PEFT checkpoint",
    ),
    ("adapters.safetensors", "adapters.safetensors is MLX's (mlx-lm), which is no PEFT checkpoint"),
    ("adapters.npz", "adapters.npz is MLX's (mlx-lm), which is no PEFT checkpoint"),
    (
        "prefix_model_config.json",
        "prefix_model_config.json is PaddleNLP's, which is no PEFT checkpoint",
    ),
    ("lora_config.json", "lora_config.json is PaddleNLP's, which is no PEFT checkpoint"),
    ("model.safetensors.index.json", "these are a whole model's weights, not an adapter's"),
    ("pytorch_model.bin.index.json", "these are a whole model's weights, not an adapter's"),
    ("model.safetensors", "model.safetensors is a whole model's, not an adapter's"),
    ("pytorch_model.bin", "pytorch_model.bin is a whole model's, or of ChatGLM's P-Tuning v2"),
)


def what_they_are(names: Iterable[str]) -> str | None:
    """What files without a PEFT checkpoint among them are; None if unknown.

    Args:
        names: file names, with or without folders.
    """
    last = {name.rpartition("/")[2].lower() for name in names}
    for name, sentence in _FILES:
        if name in last:
            return f"{sentence}; {HOW_TO_SAVE}"
    if any(name.endswith(".gguf") for name in last):
        return "a .gguf is llama.cpp's; send the files that it was converted from"
    if any(name.startswith("adapter_model-0") for name in last):
        return "the weights are in several shards; save them in one file (max_shard_size)"
    return None


def what_the_json_lacks(data: bytes) -> str | None:
    """What to do about a file that should be JSON and is none; None if it is not plain."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 old.json > adapter_config.json"
    if data.startswith(b"PK\x03\x04"):
        return "it is a zip archive; send that alone, and it is unpacked"
    text = data.decode("utf-8", "replace")
    start = text.lstrip()
    head = start[:4096]
    if not start:
        return "the file is empty"
    if start.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` and send the file"
    if start.startswith("<"):
        return "it is a web page, as a failed download leaves; fetch the file again"
    if start.startswith("{'") or any(f": {word}" in head for word in ("True", "False", "None")):
        return "it is a Python dict as print shows it; write it with json.dumps"
    if any(line.lstrip().startswith(("//", "/*", "#")) or " //" in line for line in _lines(text)):
        return "JSON has no comments; remove them"
    if not start.startswith(("{", "[", '"')) and ":" in head.partition("\n")[0]:
        return "it looks like YAML; write it as JSON"
    if any(line.rstrip().endswith(",") for line in _lines_before_a_bracket(text)):
        return "JSON has no comma after the last entry; remove it"
    return None


_LINES = 2_000


def _lines(text: str) -> list[str]:
    return text.split("\n", _LINES)[:_LINES]


def _lines_before_a_bracket(text: str) -> list[str]:
    lines = [line for line in _lines(text) if line.strip()]
    return [one for one, after in itertools.pairwise(lines) if after.strip()[0] in "]}"]
