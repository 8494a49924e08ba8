"""Names of PEFT, and of AdapterHub's library, that are not here: what to use instead.

Read by `__getattr__` of the packages that people import from. Independent of everything else.
"""

from __future__ import annotations

_TRAINING = "train with `graftwork train` or `POST /train`"
_SERVING = "serve an adapter with `graftwork serve`, or from Python with graftwork.Engine"
_NO_MODEL = f"no model is wrapped here: {_TRAINING}, and {_SERVING}"
_FILES = (
    "an adapter's tensors are in its adapter_model.safetensors: use safetensors.torch.load_file and "
    "save_file"
)
_SERVED = "served are prefix tuning, P-tuning, (IA)³, CPT and prompt tuning"
NOT_SERVED = f"a method of PEFT that is not served; {_SERVED}"
_TARGETS = "the defaults for (IA)³ are adapters.methods.ia3.DEFAULT_TARGETS"
_FROZEN = "bases are loaded frozen, as plain float weights: there is nothing to prepare"

# PEFT's classes of methods that are not served are `NameConfig`, `NameModel` and the like.
_OTHER_METHODS = {
    "AdaLora": "AdaLoRA",
    "Adamss": "AdaMSS",
    "AdaptionPrompt": "adaption prompt tuning",
    "BOFT": "BOFT",
    "Beft": "BEFT",
    "C3A": "C3A",
    "Cartridge": "the cartridge",
    "Deft": "DEFT",
    "Delora": "DeLoRA",
    "FourierFT": "FourierFT",
    "Frod": "FRoD",
    "Glora": "GLoRA",
    "Gralora": "GraLoRA",
    "HRA": "HRA",
    "Hira": "HiRA",
    "LNTuning": "layer norm tuning",
    "Lily": "Lily",
    "LoHa": "LoHa",
    "LoKr": "LoKr",
    "Lora": "LoRA",
    "Miss": "MiSS",
    "MultitaskPromptTuning": "multitask prompt tuning",
    "OFT": "OFT",
    "OSF": "OSF",
    "Peanut": "PEANuT",
    "Poly": "Poly",
    "Psoft": "PSOFT",
    "Pvera": "PVeRA",
    "RandLora": "RandLoRA",
    "Road": "RoAd",
    "Shadow": "Shadow",
    "Shira": "SHiRA",
    "Supertuning": "supertuning",
    "TinyLora": "TinyLoRA",
    "TrainableTokens": "training of single tokens",
    "UniLora": "UniLoRA",
    "VBLoRA": "VB-LoRA",
    "Vera": "VeRA",
    "WaveFT": "WaveFT",
    "XLora": "X-LoRA",
}
_SUFFIXES = ("Config", "Model", "Embedding", "Encoder", "Init")
# Options and helpers of LoRA.
_OF_LORA = (
    "ArrowConfig",
    "BdLoraConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
    "convert_to_lora",
    "create_arrow_model",
    "find_kappa_target_modules",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
)

_INSTEAD = {
    "AutoPeftModel": _NO_MODEL,
    "AutoPeftModelForCausalLM": _NO_MODEL,
    "IA3Model": "adapters.attach_ia3 wraps the targeted modules of a model, detach_ia3 restores them",
    "MixedModel": _NO_MODEL,
    "MultitaskPromptEmbedding": f"multitask prompt tuning is {NOT_SERVED}",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": _NO_MODEL,
    "NoMatchingPeftModuleError": "a target that matches no module raises adapters.errors.TargetNotFound",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _NO_MODEL,
    "PEFT_TYPE_TO_TUNER_MAPPING": "the methods are adapters.METHODS",
    "PeftError": "the errors are in adapters.errors",
    "PeftMixedModel": _NO_MODEL,
    "PeftModel": _NO_MODEL,
    "PeftModelForCausalLM": _NO_MODEL,
    "PeftWarning": "what an upload warns of is in its reply, and the library raises plain UserWarnings",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "the engine shapes prefixes itself",
    "bloom_model_postprocess_past_key_value": "the engine shapes prefixes itself",
    "cast_mixed_precision_params": "trained parameters are float32 on a base of any dtype",
    "compose_cartridge_adapters": f"cartridges are {NOT_SERVED}",
    "get_base_model_state_dict": _NO_MODEL,
    "get_layer_status": _NO_MODEL,
    "get_model_status": _NO_MODEL,
    "get_peft_model": _NO_MODEL,
    "get_peft_model_state_dict": f"METHODS[peft_type].export gives the tensors of a module; {_FILES}",
    "initialize_kv_prefix_from_past_key_values": (
        "PrefixEncoder.load_prompt_embeddings(prompt_embeddings_from_past_key_values(...)) does it for "
        "a module of your own"
    ),
    "initialize_kv_prefix_from_text": (
        "start a training job from a text with `init_text` (`graftwork train --init-text`); for a module "
        "of your own, PrefixEncoder.load_prompt_embeddings(prompt_embeddings_from_past_key_values(...))"
    ),
    "inject_adapter_in_model": f"adapters.attach_ia3 does it for (IA)³; {_NO_MODEL}",
    "load_peft_weights": _FILES,
    "prepare_model_for_kbit_training": _FROZEN,
    "set_base_model_state_dict": _NO_MODEL,
    "set_peft_model_state_dict": f"load_prompt_embeddings of a module takes saved rows; {_FILES}",
    "shift_tokens_right": "training shifts labels itself",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": _TARGETS,
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": _TARGETS,
}
# PEFT's modules, which hold what the package holds.
_MODULES = ("auto", "config", "mapping", "peft_model", "tuners", "utils")
_OTHER_HEADS = (
    "FeatureExtraction",
    "QuestionAnswering",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
)

# AdapterHub's library is also imported as `adapters`.
_ADAPTERHUB = (
    "AdapterConfig",
    "AdapterTrainer",
    "AutoAdapterModel",
    "BnConfig",
    "CompacterConfig",
    "ConfigUnion",
    "DoubleSeqBnConfig",
    "LoRAConfig",
    "MAMConfig",
    "ParBnConfig",
    "Seq2SeqAdapterTrainer",
    "SeqBnConfig",
    "UniPELTConfig",
    "init",
)


def absent_names() -> dict[str, str]:
    """Every name that is known to be absent -> the sentence that says what to use."""
    heads = {
        f"{kind}For{head}": "only text generation is served, no output heads and no encoder-decoders"
        for kind in ("PeftModel", "AutoPeftModel")
        for head in _OTHER_HEADS
    }
    methods = {
        name + suffix: f"{words} is {NOT_SERVED}"
        for name, words in _OTHER_METHODS.items()
        for suffix in _SUFFIXES
    }
    lora = {name: f"it belongs to LoRA, which is not served; {_SERVED}" for name in _OF_LORA}
    hub = {
        name: "it is in AdapterHub's library, which is also imported as `adapters`; this is Graftwork's. "
        "Install the two in separate environments"
        for name in _ADAPTERHUB
    }
    modules = {
        name: f"PEFT's module {name} has no counterpart: import the name from adapters itself"
        for name in _MODULES
    }
    return {**methods, **lora, **hub, **heads, **modules, **_INSTEAD}


def why_not_trained(method: str) -> str | None:
    """Why a method of PEFT is not trained here; None for any other text.

    Args:
        method: in any usual spelling, such as "LoRA", "LORA", "PeftType.ADALORA" and "LoraConfig".
    """
    plain = letters(method[:100].rpartition(".")[2])
    for suffix in ("config", "model"):
        plain = plain.removesuffix(suffix)
    words = _BY_LETTERS.get(plain)
    if words is None:
        return None
    merged = "; serve a base that has it merged in" if words in ("LoRA", *_KINDS_OF_LORA) else ""
    return f"{words} is a method of PEFT that is neither trained nor served here{merged}"


def letters(name: str) -> str:
    """A name's letters and digits in lower case."""
    return "".join(one for one in name.lower() if one.isalnum())


# What people write for LoRA with an option of its own.
_KINDS_OF_LORA = ("QLoRA", "DoRA", "rsLoRA", "PiSSA")
_BY_LETTERS = {
    **{letters(name): words for name, words in _OTHER_METHODS.items()},
    "bone": "Bone",
    **{letters(words): words for words in (*_OTHER_METHODS.values(), *_KINDS_OF_LORA)},
}


def check_absent(name: str) -> None:
    """Refuse an import of a name that PEFT or AdapterHub has and this library does not.

    Raises:
        ImportError: with what to use. Python hides the message of an AttributeError in `from x import y`.
    """
    instead = absent_names().get(name)
    if instead is not None:
        raise ImportError(f"there is no {name} here: {instead}", name=name)
