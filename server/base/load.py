"""Loading a base model, frozen: from a local directory or from the hub at a pinned commit.

Safetensors only, and never code from a checkpoint. What cannot be served is refused here, before
any weight is read if the config is sufficient. If the stored dtype is the served one, the weights stay
memory-mapped: the model's tensors are pages of the file, shared and evictable. Independent of adapters,
the engine, and the conversion of the default base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapters.base_model import BaseModelSpec, describe
from adapters.errors import BaseUnsupported, reason_of
from server.base.architecture import check_layers, text_config
from server.base.check import check_architecture, check_files, local_directory
from server.base.convert import quiet_progress_bars, read_manifest
from server.base.digest import CONFIG_FILE, base_digest
from server.base.dtypes import DTYPES, default_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

# These recompute their frequencies from the longest sequence of the batch.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_MANY = 3
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory.

    Attributes:
        model: in eval mode, no parameter requires a gradient.
        spec: its dimensions, digest and served dtype.
        name: display name in model lists; its identity is `spec.digest`.
        notes: sentences for users, such as that the weights were once quantized.
        tokenizer_dir: a directory for `load_tokenizer`.
        config: the model's config.
        eos_token_ids: ids that end a sequence, from the generation config.
    """

    model: PreTrainedModel
    spec: BaseModelSpec
    name: str
    notes: tuple[str, ...]
    tokenizer_dir: Path
    config: PretrainedConfig
    eos_token_ids: tuple[int, ...]


def load_base(
    path_or_id: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> LoadedBase:
    """Load and freeze a base model.

    Args:
        path_or_id: a local Hugging Face directory, or a hub id (then `revision` is needed).
        dtype: "bfloat16", "float32" or "float16"; None takes `default_dtype(device)`.
        device: a torch device; None takes "cuda" where there is one, else "cpu".
        revision: the hub commit, 40 hex digits. Branches and tags move, so they are refused.
        cache_dir: cache of the digest if the base's own directory is read-only.

    Raises:
        BaseUnsupported: with the reason.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    served = _dtype(dtype or default_dtype(device))
    directory = _directory(path_or_id, revision)
    check_files(directory)
    config = _config(directory)
    check_config(config)
    digest = base_digest(directory, cache_dir)
    model, unused = _load_weights(directory, config, served)
    model = model.to(device)  # type: ignore[arg-type]
    manifest = read_manifest(directory) or {}
    notes = [str(manifest["note"])] if "note" in manifest else []
    if unused:
        notes.append(f"{len(unused)} tensors of the checkpoint belong to no part of the model")
    is_hub_id = revision is not None
    return LoadedBase(
        model=model,
        spec=describe(model, digest=digest, dtype=_dtype_name(served)),
        name=str(path_or_id) if is_hub_id else str(manifest.get("name", directory.resolve().name)),
        notes=tuple(notes),
        tokenizer_dir=directory,
        config=model.config,
        eos_token_ids=_eos_token_ids(model),
    )


def describe_base(
    path_or_id: str | Path, *, dtype: str | None = None, revision: str | None = None
) -> BaseModelSpec:
    """The spec that adapters are checked against, from the files of a base. Loads no weights.

    Does not check that the weights can be loaded.

    Args:
        path_or_id: see `load_base`.
        dtype: see `load_base`, for a base on the CPU.
        revision: see `load_base`.

    Raises:
        BaseUnsupported: with the reason.
    """
    served = _dtype(dtype or default_dtype("cpu"))
    directory = _directory(path_or_id, revision)
    check_files(directory)
    config = _config(directory)
    check_config(config)
    with torch.device("meta"):
        model = _built(config)
    return describe(model, digest=base_digest(directory), dtype=_dtype_name(served))


def _built(config: PretrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (
        Exception
    ) as error:  # a config's missing or wrong number fails anywhere in a model's code
        raise _does_not_build(config, error) from error
    return model


def _does_not_build(config: PretrainedConfig, error: Exception) -> BaseUnsupported:
    return BaseUnsupported(
        f"transformers builds no {config.model_type} from this {CONFIG_FILE} ({reason_of(error)}); "
        "expected a complete config of a decoder-only language model",
        field=CONFIG_FILE,
    )


def check_config(config: PretrainedConfig) -> None:
    """Refuse bases that the config alone shows to be unsupported.

    Raises:
        BaseUnsupported: encoder-decoders, models with no causal language-modelling class,
            quantized checkpoints, layers that differ in size or are not plain attention, position
            encodings that depend on the rest of the batch.
    """
    kind = config.model_type
    facts = ("is_encoder_decoder", "is_decoder")
    read = {name: getattr(config, name, False) for name in facts}
    check_architecture("the base", {"model_type": kind, **read})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BaseUnsupported(
            f"{kind} has no causal language-modelling class in transformers",
            field="model_type",
            expected="a decoder-only language model",
            came=kind,
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise BaseUnsupported(
            "the checkpoint is quantized; expected plain float weights (dequantize it first)",
            field="quantization_config",
            expected="absent",
            came=str(quantization)[:80],
        )
    check_layers(config)
    for rope in _rope_types(config):
        if any(name in rope for name in _BATCH_DEPENDENT_ROPE):
            raise BaseUnsupported(
                f"rope type {rope!r} changes its frequencies with the longest sequence of the "
                "batch, so one request's answer would depend on the others",
                field="rope_parameters.rope_type",
                expected="default, linear, yarn, llama3 or proportional",
                came=rope,
            )


def _rope_types(config: PretrainedConfig) -> Iterator[str]:
    """Every rope type that a config names; Gemma 3 has one for each kind of layer."""
    parameters = getattr(text_config(config), "rope_parameters", None) or {}
    for entry in (parameters, *parameters.values()):
        if isinstance(entry, dict) and "rope_type" in entry:
            yield str(entry["rope_type"])


def _directory(path_or_id: str | Path, revision: str | None) -> Path:
    """The local directory of a base, downloaded from the hub if necessary."""
    directory = local_directory(path_or_id, revision)
    return _download(str(path_or_id), str(revision)) if directory is None else directory


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        why = " ".join(str(error).split())[:_MOST_CHARACTERS]
        raise BaseUnsupported(
            f"{name} at {revision} is not on this disk, and cannot be had from the hub: {why}"
        ) from error


def _config(directory: Path) -> PretrainedConfig:
    try:
        raw: dict[str, Any]
        raw, _ = PretrainedConfig.get_config_dict(directory, local_files_only=True)
        kind = raw.get("model_type")
        if not isinstance(kind, str):
            raise BaseUnsupported(
                f"{directory}: {CONFIG_FILE} names no model_type, expected that of a model of "
                'transformers, such as "llama"',
                field="model_type",
                came="none",
            )
        if kind not in CONFIG_MAPPING:
            raise BaseUnsupported(
                f"model type {kind!r} is unknown to transformers {transformers.__version__}; code that "
                "comes with a checkpoint is never run",
                field="model_type",
                came=str(kind),
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except BaseUnsupported:
        raise
    except Exception as error:  # validation of a config raises whatever its class likes
        raise BaseUnsupported(
            f"{directory}: {CONFIG_FILE} is invalid: {reason_of(error)}", field=CONFIG_FILE
        ) from error
    return config


def _load_weights(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """The frozen model, and the names of unused checkpoint tensors.

    transformers keeps tensors that need no conversion memory-mapped on the CPU (a test checks this), so
    nothing is copied here.
    """
    with quiet_progress_bars():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseUnsupported(f"{directory}: the weights do not load: {error}") from error
        except Exception as error:
            raise _does_not_build(config, error) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would initialise these at random, with only a log message.
        raise BaseUnsupported(
            f"{directory}: {len(missing)} weights of the model are not in the checkpoint: "
            f"{', '.join(missing[:_MANY])}",
            field=missing[0],
        )
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen, sorted(info["unexpected_keys"])


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BaseUnsupported(
            f"dtype {name!r} is not served",
            field="dtype",
            expected=" or ".join(DTYPES),
            came=name,
        )
    return DTYPES[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
