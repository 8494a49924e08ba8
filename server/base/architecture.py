"""Whether the layers of a base are of a kind that the engine serves, from its config alone.

The engine keeps keys and values of one size for all layers and asks every layer for plain attention. What
a config cannot show is found by `server.engine.self_check`. Independent of files and weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from adapters.errors import BaseUnsupported

# Kinds of layers in transformers' `layer_types` that keep keys and values of every position they need.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Numbers that the cache of keys and values has once for all layers -> what a person calls them.
_ONE_FOR_ALL_LAYERS = {
    "head_dim": "head sizes",
    "num_attention_heads": "numbers of attention heads",
    "num_key_value_heads": "numbers of key/value heads",
    "hidden_size": "widths",
}
_SHOWN = 3


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model.

    Raises:
        BaseUnsupported: it has several.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise BaseUnsupported(
            f"{config.model_type} holds several language models; expected a decoder-only model",
            field="model_type",
            expected="a decoder-only language model",
            came=config.model_type,
        ) from error


def check_layers(config: PretrainedConfig) -> None:
    """Refuse layers that differ in their sizes, and layers that are not plain attention.

    Raises:
        BaseUnsupported: naming the kind of layers, or the sizes.
    """
    text = text_config(config)
    kind = config.model_type
    varying = set(getattr(text, "per_layer_attributes", None) or ())
    for name in sorted(varying & _ONE_FOR_ALL_LAYERS.keys()):
        sizes = sorted({getattr(layer, name) for layer in text.per_layer_config})
        if len(sizes) > 1:
            raise BaseUnsupported(
                f"{kind} has layers with different {_ONE_FOR_ALL_LAYERS[name]} ({_listed(sizes)}), "
                "which are not served; expected a model whose layers all have the same",
                field=name,
                expected="one number for all layers",
                came=_listed(sizes),
            )
    others = sorted({str(one) for one in _layer_types(text)} - ATTENTION_LAYERS)
    if others:
        raise BaseUnsupported(
            f"{kind} has layers of the kind {_listed(others)}, which are not served; expected a model "
            "whose layers are all full, sliding or chunked attention",
            field="layer_types",
            expected=", ".join(sorted(ATTENTION_LAYERS)),
            came=_listed(others),
        )


def _layer_types(text: PretrainedConfig) -> Iterable[Any]:
    types = getattr(text, "layer_types", None)
    return types if isinstance(types, list | tuple) else ()


def _listed(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
