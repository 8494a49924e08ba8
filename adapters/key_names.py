"""Tensor names that PEFT loads without effect: which program left them, and the lines that rename them.

Such names bind to nothing, and PEFT then serves the bare base with no more than a warning; so they are
refused, with a command that mends the file. Strings only: independent of tensors, methods and errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Untrusted names that may stand in a Python string inside a shell's double quotes.
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,200}")

# Parts of a name that a wrapper around the model leaves -> the wrapper.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DataParallel or DeepSpeed",
}
# Parts of a name that say what a tensor is instead of an adapter's.
_FOREIGN = {
    "prefix_encoder": "ChatGLM's P-Tuning v2, which is no PEFT checkpoint",
    "lora_A": "LoRA",
    "lora_B": "LoRA",
    "lora_a": "LoRA (MLX)",
    "lora_b": "LoRA (MLX)",
    "mlp_head": "the network that computes a prompt in training; save_pretrained stores its output",
    "lstm_head": "the network that computes a prompt in training; save_pretrained stores its output",
    "transform": "the projection that computes a prefix in training; save_pretrained stores its output",
    "embed_tokens": "the base's embeddings; save with save_embedding_layers=False",
    "wte": "the base's embeddings; save with save_embedding_layers=False",
    "word_embeddings": "the base's embeddings; save with save_embedding_layers=False",
    "lm_head": "the base's output head; save with save_embedding_layers=False",
    "modules_to_save": "a module that was trained in full (modules_to_save)",
    "original_module": "a module that was trained in full (modules_to_save)",
}


def explain(names: Collection[str], binds: Callable[[str], bool]) -> str | None:
    """Where names that bind to nothing come from, and what to do; None if it is not plain.

    Args:
        names: all tensor names of the file.
        binds: whether a name is one that binds.
    """
    faulty = [name for name in names if not binds(name)]
    for part, origin in _FOREIGN.items():
        if any(part in name.split(".") for name in faulty):
            return f"such a tensor is of {origin}"
    return renaming(names, binds)


def renaming(names: Collection[str], binds: Callable[[str], bool]) -> str | None:
    """What to leave out of, or put before, all names so that they bind; None if that does not help.

    Args:
        names: all tensor names of the file.
        binds: whether a name is one that binds.
    """
    faulty = [name for name in names if not binds(name)]
    wrappers = [part for part in _WRAPPERS if any(part in name.split(".") for name in faulty)]
    for added in ("", PREFIX):
        for last in (False, True):
            dropped = [*wrappers, *(_adapter_names(faulty) if last else ())]
            if (dropped or added) and _all_bind(names, dropped, added, binds):
                return f"{_left_by(wrappers, dropped)}; rename them: {_command(dropped, added)}"
    return None


def rename_to(wanted: str, name: str) -> str | None:
    """How to give a file's only tensor another name; None if it is another thing by its name."""
    words = ("prompt", "prefix", "embedding", "weight")
    if not _SAFE.fullmatch(name) or not any(word in name for word in words):
        return None
    command = _python(f"{{'{wanted}': t['{name}']}}")
    return f"if that is it, rename it: {command}"


def _adapter_names(names: Collection[str]) -> tuple[str, ...]:
    """The last part of all names, where PEFT's own state_dict has the adapter's name."""
    last = {name.rpartition(".")[2] for name in names if "." in name}
    return tuple(last) if len(last) == 1 and all(map(_SAFE.fullmatch, last)) else ()


def _all_bind(
    names: Collection[str], dropped: Collection[str], added: str, binds: Callable[[str], bool]
) -> bool:
    renamed = {_renamed(name, dropped, added) for name in names}
    return len(renamed) == len(names) and all(binds(name) for name in renamed)


def _renamed(name: str, dropped: Collection[str], added: str) -> str:
    return added + ".".join(part for part in name.split(".") if part not in dropped)


def _left_by(wrappers: Collection[str], dropped: Collection[str]) -> str:
    if wrappers:
        origins = " and ".join(_WRAPPERS[part] for part in wrappers)
        return f"the names were left by {origins}, and PEFT would load them without effect"
    if dropped:
        return "the names hold the adapter's name, as the model's own state_dict does"
    return "the names lack what PEFT puts before them, and PEFT would load them without effect"


def _command(dropped: Collection[str], added: str) -> str:
    key = "k"
    if dropped:
        parts = "".join(f"'{part}', " for part in dropped)
        key = f"'.'.join(p for p in k.split('.') if p not in ({parts}))"
    if added:
        key = f"'{added}' + {key}"
    return _python(f"{{{key}: v for k, v in t.items()}}")


def _python(tensors: str) -> str:
    return (
        'python -c "from safetensors.torch import load_file, save_file; '
        f"t = load_file('{TENSORS_FILE}'); save_file({tensors}, '{TENSORS_FILE}', "
        "metadata={'format': 'pt'})\""
    )
