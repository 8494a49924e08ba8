"""Whether a base can be served, as far as the names and the JSON of its files say.

Runs before anything is fetched, started or loaded, and says in one sentence what is no base.
Reads neither weights nor tokenizers, imports neither torch nor transformers; `load` looks closer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.base_files import weight_files
from adapters.errors import BaseUnsupported
from adapters.field_errors import listed
from server.base.digest import CONFIG_FILE

ADAPTER_CONFIG_FILE = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MANY = 3

# Model types that read a text from both sides. Some have a causal class in transformers too, whose
# answers are noise unless the checkpoint was trained as a decoder (`is_decoder`).
_ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "big_bird",
        "camembert",
        "convbert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "esm",
        "eurobert",
        "flaubert",
        "fnet",
        "funnel",
        "ibert",
        "layoutlm",
        "longformer",
        "luke",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "mpnet",
        "mra",
        "nomic_bert",
        "nystromformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "squeezebert",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "yoso",
    }
)
_EXPECTED = "a decoder-only language model, such as a Llama, Qwen, Mistral or GPT-2"


def check_base(
    path_or_id: str | Path, revision: str | None, *, needs_tokenizer: bool = True
) -> Path | None:
    """Look at the files of a base; a tokenizer is needed wherever texts are.

    Returns:
        Its directory; None for a hub id, whose files may not be here yet.

    Raises:
        BaseUnsupported: it cannot be served, with what it is and what to do.
    """
    directory = local_directory(path_or_id, revision)
    if directory is None:
        return None
    check_files(directory)
    check_architecture(directory, read_config(directory))
    if needs_tokenizer:
        check_tokenizer(directory)
    return directory


def local_directory(path_or_id: str | Path, revision: str | None) -> Path | None:
    """The directory that is meant; None for a hub id with a pinned commit.

    Raises:
        BaseUnsupported: neither.
    """
    name, path = str(path_or_id), Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BaseUnsupported(
                f"{path} is a local directory; a revision belongs to a hub id", field="revision"
            )
        return path
    if path.exists():
        raise BaseUnsupported(f"{name} is a file; {_of_a_file(path)}", field="base", came="a file")
    if not _HUB_ID.fullmatch(name) or (path.parent != Path() and path.parent.is_dir()):
        raise BaseUnsupported(
            f"{name}: expected a directory with a Hugging Face model, or a hub id; there is no such "
            f"directory{_near(path)}",
            field="base",
        )
    if revision is None or not _COMMIT.fullmatch(revision):
        raise BaseUnsupported(
            f"{name} is no directory here{_near(path)}; as a hub id it needs a pinned revision "
            "(--revision), the commit's 40 hex digits: a branch or a tag can change under the "
            "adapters made for it",
            field="revision",
            expected="40 hex digits",
            came=str(revision),
        )
    return None


def check_files(directory: Path) -> None:
    """Refuse a directory that is not a model's with its weights in safetensors.

    Raises:
        BaseUnsupported: with what it holds.
    """
    has_adapter = (directory / ADAPTER_CONFIG_FILE).is_file()
    if not (directory / CONFIG_FILE).is_file():
        if has_adapter:
            raise BaseUnsupported(
                f"{directory} is an adapter, not a base model: serve its base, and add it with "
                f"graftwork adapters add {directory}",
                field=CONFIG_FILE,
            )
        raise BaseUnsupported(
            f"{directory} is not a Hugging Face model: it has no {CONFIG_FILE}{_inside(directory)}",
            field=CONFIG_FILE,
        )
    if has_adapter:
        # transformers would look for PEFT and merge the adapter into the base.
        raise BaseUnsupported(
            f"{directory} holds an adapter beside the base; expected the base alone",
            field=ADAPTER_CONFIG_FILE,
        )
    weights = _weights(directory)
    if not weights:
        pickles = sorted(file.name for mask in _PICKLES for file in directory.glob(mask))
        came = "none"
        if pickles:
            came = (
                f"only pickles ({', '.join(pickles[:_MANY])}), which are never read; load the model "
                "with transformers and save it again with save_pretrained"
            )
        raise BaseUnsupported(
            f"{directory}: expected safetensors weights, came {came}",
            field="model.safetensors",
        )
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise BaseUnsupported(f"{directory}: shards are missing: {', '.join(missing[:_MANY])}")


def check_architecture(where: Path | str, config: dict[str, Any]) -> None:
    """Refuse models that do not continue a text.

    Raises:
        BaseUnsupported: an encoder-decoder or an encoder.
    """
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise BaseUnsupported(
            f"{where}: {kind} is an encoder-decoder, which is not served; expected {_EXPECTED}",
            field="is_encoder_decoder",
            expected="false",
            came="true",
        )
    if kind in _ENCODERS and not config.get("is_decoder"):
        raise BaseUnsupported(
            f"{where}: {kind} is an encoder: it reads whole texts and continues none; expected "
            f"{_EXPECTED}",
            field="model_type",
            expected="a decoder-only language model",
            came=str(kind),
        )


def check_tokenizer(directory: Path) -> None:
    """Refuse a directory without any tokenizer's file.

    Raises:
        BaseUnsupported: there is none.
    """
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise BaseUnsupported(
            f"{directory} holds no tokenizer (tokenizer.json or tokenizer.model); put the model's "
            "own there: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
            field="tokenizer.json",
            expected="tokenizer.json or tokenizer.model",
            came="none",
        )


def read_config(directory: Path) -> dict[str, Any]:
    """The object in `config.json`.

    Raises:
        BaseUnsupported: it is no JSON object, or says no model type.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseUnsupported(
            f"{directory}: {CONFIG_FILE} is invalid: {error}", field=CONFIG_FILE
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BaseUnsupported(
            f"{directory}: {CONFIG_FILE} is invalid: expected an object with a model_type, as "
            "transformers writes it",
            field=CONFIG_FILE,
        )
    return config


def _weights(directory: Path) -> list[Path]:
    try:
        return weight_files(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseUnsupported(
            f"{directory}: model.safetensors.index.json is invalid: {error}"
        ) from error


# --- hints ---------------------------------------------------------------------------------------


def _of_a_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            "GGUF is not served: expected a directory with safetensors; transformers reads it with "
            "from_pretrained(DIRECTORY, gguf_file=NAME), and save_pretrained writes one"
        )
    if path.suffix in (".safetensors", ".json"):
        return f"name its directory: {path.parent}"
    return "expected a directory with a Hugging Face model"


def _near(path: Path) -> str:
    """A directory beside the one that was named, if its name is much the same."""
    try:
        names = [one.name for one in path.parent.iterdir() if one.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _inside(directory: Path) -> str:
    """Where a base lies in a directory that is none itself."""
    found = sorted(one.parent for mask in _PLACES for one in directory.glob(mask))
    bases = [one for one in found if not (one / ADAPTER_CONFIG_FILE).exists()]
    if bases:
        return f"; there is one in {listed([str(one) for one in bases[:_MANY]])}"
    kinds = dict(_kinds(directory))
    return f"; it holds {kinds[next(iter(kinds))]}" if kinds else ""


# Beside each other, or as the hub's client caches them.
_PLACES = (f"*/{CONFIG_FILE}", f"snapshots/*/{CONFIG_FILE}")


def _kinds(directory: Path) -> Iterator[tuple[str, str]]:
    for mask, what in (
        ("*.gguf", "a GGUF file, which is not served: expected safetensors"),
        ("*.safetensors", "weights alone: its config and tokenizer belong beside them"),
        (f"*/{ADAPTER_CONFIG_FILE}", "adapters: add them with graftwork adapters add"),
    ):
        if next(directory.glob(mask), None) is not None:
            yield mask, what
