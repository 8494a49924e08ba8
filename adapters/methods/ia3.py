"""IA3: one trained vector per targeted linear module scales its output, or a feedforward's input.

Paper: Liu et al. 2022, arXiv 2205.05638. Parity source: peft/tuners/ia3. Untrusted regular expressions
are stored as text and never run: a checkpoint binds by its tensor names. Independent of other methods,
files and the engine.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator
from torch import nn

from adapters import key_names
from adapters.base_model import BaseModelSpec, LinearSpec
from adapters.checks import (
    check_dtypes,
    check_modules_to_save,
    check_task_type,
    quoted,
    sharded,
    some_of,
    to_float32,
)
from adapters.errors import ConfigInvalid, TargetNotFound, TensorMismatch
from adapters.method import AdapterFacts, PeftConfig, TensorInfo
from adapters.parts import ActivationScales
from adapters.trainable import FrozenBase, VirtualTargets

PREFIX = "base_model.model."
SUFFIX = ".ia3_l"
ADAPTER_NAME = ".default"
ALL_LINEAR = "all-linear"
LONGEST_COMPARED = 200
_PLAIN = re.compile(r"[\w.-]*")  # a pattern of letters, and of dots for any one character

# model_type -> (targets, those of them that are feedforward). PEFT's defaults for decoders.
# Source: peft/utils/constants.py.
DEFAULT_TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    "falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gemma": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma3_text": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "phi": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "qwen2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen3": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
}


def _listed(value: Any) -> Any:
    """Convert PEFT's set of names to an equivalent list in a fixed order, which can be stored."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value


Names = Annotated[list[str] | str | None, BeforeValidator(_listed)]


class IA3Config(PeftConfig):
    """PEFT's config of IA3. Source: peft/tuners/ia3/config.py.

    Attributes:
        target_modules: names (exact, or the end of a path after a dot), "all-linear", or a regular
            expression of PEFT's, which is never run here; the architecture's default if unset.
        exclude_modules: names that are left out.
        feedforward_modules: names whose input is scaled instead of the output; a path matches when
            it ends with one. The architecture's default if unset, even with explicit targets.
        fan_in_fan_out: True where the modules are `Conv1D`.
        modules_to_save: not served.
        init_ia3_weights: start from ones; False starts from random numbers.
    """

    only_training: ClassVar[frozenset[str]] = PeftConfig.only_training | {
        "fan_in_fan_out",
        "init_ia3_weights",
    }

    peft_type: Literal["IA3"] = "IA3"
    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def check_as_peft(self) -> None:
        """PEFT's class refuses what PEFT would not load. Source: peft/tuners/ia3/config.py."""
        try:
            self.check_peft_loads()
        except ConfigInvalid as error:
            raise ValueError(str(error)) from error

    def check_peft_loads(self) -> None:
        """PEFT takes feedforward names that are among the targets, word for word, and no others.

        Raises:
            ConfigInvalid: another feedforward name.
        """
        targets, feedforward = self.target_modules, self.feedforward_modules
        if not isinstance(targets, list) or not isinstance(feedforward, list):
            return
        missing = sorted(frozenset(feedforward) - frozenset(targets))
        if missing:
            raise ConfigInvalid(
                f"feedforward_modules holds {some_of(missing)}, which target_modules "
                f"({some_of(sorted(targets))}) does not: PEFT does not load such a config; expected names "
                "of target_modules, word for word, such as those of them whose tensors have the shape "
                "(1, n), or [] if there are none",
                field="feedforward_modules",
                expected="a subset of target_modules",
                came=some_of(missing),
            )


# --- which modules ---------------------------------------------------------------------------


def ia3_targets(config: IA3Config, base: BaseModelSpec) -> dict[str, bool]:
    """The modules that a locally made config targets on this base.

    Returns:
        Dotted module path -> whether it is feedforward, in the order of the base's modules.

    Raises:
        ConfigInvalid: a regular expression, or nothing given for an unknown architecture.
        TargetNotFound: a target matches no module; the message names near ones.
    """
    names = _target_names(config, base)
    excluded = _literal(config, "exclude_modules") or []
    feedforward = _feedforward_names(config, base)
    for name in _unmatched(names, base):
        raise _target_not_found(name, base)
    feedforward_set = frozenset(feedforward)
    targets = {
        path: ends_with_any(path, feedforward_set) for path in _targeted(names, excluded, base)
    }
    if not targets:
        raise TargetNotFound(
            f"exclude_modules ({some_of(excluded)}) leaves no target among {some_of(names)}",
            field="exclude_modules",
            came=some_of(excluded),
        )
    return targets


def _target_names(config: IA3Config, base: BaseModelSpec) -> list[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return list(base.linear_modules)
    if targets is None:
        return _defaults(base, "target_modules")[0]
    return _literal(config, "target_modules") or []


def _feedforward_names(config: IA3Config, base: BaseModelSpec) -> list[str]:
    if config.feedforward_modules is None:
        return _defaults(base, "feedforward_modules")[1]
    return _literal(config, "feedforward_modules") or []


def _defaults(base: BaseModelSpec, field: str) -> tuple[list[str], list[str]]:
    found = DEFAULT_TARGETS.get(base.model_type)
    if found is None:
        raise ConfigInvalid(
            f"{field} is unset and there is no default for {base.model_type!r}; "
            f"expected names such as {some_of(_last_names(base))}",
            field=field,
            expected="a list of module names",
            came="null",
        )
    return found


def _literal(config: IA3Config, field: str) -> list[str] | None:
    names: list[str] | str | None = getattr(config, field)
    if isinstance(names, str):
        raise ConfigInvalid(
            f"{field} is the text {quoted(names)}, which PEFT runs as a regular expression; "
            f"that is not done here: expected a list of names, or {ALL_LINEAR!r} as target_modules",
            field=field,
            expected="a list of module names",
            came=quoted(names),
        )
    return names


# An untrusted list may hold a hundred thousand names. A path's suffixes are looked up in a set, so the
# cost is linear in the modules instead of modules times names.


def dotted_endings(path: str) -> set[str]:
    """The names that match a path: itself, and whatever follows one of its dots."""
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _targeted(names: list[str], excluded: list[str], base: BaseModelSpec) -> list[str]:
    """The paths that `names` match and `excluded` do not, in the order of the modules."""
    wanted, unwanted = frozenset(names), frozenset(excluded)
    endings = {path: dotted_endings(path) for path in base.linear_modules}
    return [path for path, own in endings.items() if own & wanted and not own & unwanted]


def _unmatched(names: list[str], base: BaseModelSpec) -> list[str]:
    """The names that match no path."""
    known = set().union(*(dotted_endings(path) for path in base.linear_modules))
    return [name for name in names if name not in known]


def ends_with_any(path: str, names: AbstractSet[str]) -> bool:
    """Whether the path ends with one of the names, at a dot or not."""
    return any(path[start:] in names for start in range(len(path) + 1))


def _last_names(base: BaseModelSpec) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in base.linear_modules})


def _target_not_found(name: str, base: BaseModelSpec) -> TargetNotFound:
    """The refusal of a name or path, with the nearest modules that the base does have."""
    candidates = list(base.linear_modules) if name.count(".") > 1 else _last_names(base)
    compared = name[:LONGEST_COMPARED]  # the comparison's time grows with the square
    near = difflib.get_close_matches(compared, candidates, n=3, cutoff=0.5)
    hint = f"near ones: {some_of(near)}" if near else f"it has {some_of(_last_names(base))}"
    return TargetNotFound(
        f"target {quoted(name)} matches no linear module of the base ({hint}); "
        "the output head and modules that are not linear cannot be scaled",
        field="target_modules",
        expected=some_of(near) if near else some_of(_last_names(base)),
        came=quoted(name),
    )


# --- the trainable module --------------------------------------------------------------------


class IA3Linear(nn.Module):
    """A linear module of the base with its vector.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`.
        is_feedforward: scale the input instead of the output.
        init_ia3_weights: ones, else random numbers.

    Attributes:
        base_layer: the wrapped module, unchanged.
        ia3_l: float32, (out, 1), or (1, in) where feedforward.
        in_features: width of the input.
        out_features: width of the output.

    Raises:
        TypeError: another kind of module.
    """

    def __init__(
        self, base_layer: nn.Module, *, is_feedforward: bool, init_ia3_weights: bool = True
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_feedforward = is_feedforward
        self.in_features, self.out_features = _widths(base_layer)
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        start = torch.ones(shape) if init_ia3_weights else torch.randn(shape)
        self.ia3_l = nn.Parameter(start.to(self.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The wrapped module's weight, which some models access directly."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The wrapped module's bias."""
        bias: torch.Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out); multiplied in float32 and rounded once to x's dtype."""
        scale = self.ia3_l.flatten()
        if self.is_feedforward:
            scaled: torch.Tensor = self.base_layer((x * scale).to(x.dtype))
            return scaled
        result: torch.Tensor = self.base_layer(x)
        return (result * scale).to(result.dtype)


def _widths(layer: nn.Module) -> tuple[int, int]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape  # Conv1D stores (in, out)
        return int(rows), int(columns)
    raise TypeError(f"IA3 scales Linear and Conv1D modules, came {type(layer).__name__}")


def attach_ia3(model: nn.Module, config: IA3Config, base: BaseModelSpec) -> dict[str, IA3Linear]:
    """Wrap the targeted modules of a loaded base, in place; `detach_ia3` is the inverse.

    Freezes nothing: the caller decides what is trained.

    Returns:
        Module path -> its wrapper.

    Raises:
        ValueError: the model carries IA3 already.
        AdapterError: as `ia3_targets`.
    """
    if ia3_layers(model):
        raise ValueError("the model carries IA3 modules already; detach them first")
    targets = ia3_targets(config, base)
    for path, is_feedforward in targets.items():
        wrapper = IA3Linear(
            model.get_submodule(path),
            is_feedforward=is_feedforward,
            init_ia3_weights=config.init_ia3_weights,
        )
        model.set_submodule(path, wrapper)
    return ia3_layers(model)


def detach_ia3(model: nn.Module) -> None:
    """Restore the wrapped modules in place; a model without IA3 is left unchanged."""
    for path, layer in ia3_layers(model).items():
        model.set_submodule(path, layer.base_layer)


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """Module path -> wrapper, for every wrapper in the model."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, IA3Linear)}


def load_ia3(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's vectors into the wrappers.

    Raises:
        TensorMismatch: the checkpoint and the wrappers differ in names or shapes.
    """
    layers = {PREFIX + path + SUFFIX: layer for path, layer in ia3_layers(model).items()}
    if layers.keys() != tensors.keys():
        differ = sorted(layers.keys() ^ tensors.keys())
        raise TensorMismatch(f"checkpoint and model differ in {some_of(differ)}", field=differ[0])
    with torch.no_grad():
        for name, layer in layers.items():
            if layer.ia3_l.shape != tensors[name].shape:
                raise TensorMismatch(
                    f"tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                    f"expected {tuple(layer.ia3_l.shape)}",
                    field=name,
                    expected=str(tuple(layer.ia3_l.shape)),
                    came=str(tuple(tensors[name].shape)),
                )
            layer.ia3_l.copy_(tensors[name])


# --- checkpoint mapping ----------------------------------------------------------------------


def bind_paths(tensors: Mapping[str, TensorInfo], base: BaseModelSpec) -> dict[str, str]:
    """Tensor name -> path of the linear module that it scales.

    Raises:
        TensorMismatch: no tensor at all, or a name that is not an IA3 vector's.
        TargetNotFound: the base has no such module; the message names near ones.
    """
    if not tensors:
        raise TensorMismatch(
            f"the checkpoint holds no tensor, expected names such as "
            f"{PREFIX + next(iter(base.linear_modules), '...') + SUFFIX!r}",
            field="adapter_model.safetensors",
        )
    paths: dict[str, str] = {}
    for name in tensors:
        path = _path(name)
        if path is None:
            raise _binds_to_nothing(name, tensors, base)
        if path not in base.linear_modules:
            wrapped = key_names.renaming(tensors, lambda one: _path(one) in base.linear_modules)
            raise _target_not_found(path, base) if wrapped is None else _unbound(name, wrapped)
        paths[name] = path
    if len(set(paths.values())) < len(paths):
        raise _twice(paths)
    return paths


def plain_name(name: str) -> str:
    """A vector's name as `save_pretrained` writes it.

    PEFT also loads names as its model's own state_dict has them, with the adapter's name at the end.
    """
    return name.removesuffix(ADAPTER_NAME) if name.endswith(SUFFIX + ADAPTER_NAME) else name


def _path(name: str) -> str | None:
    """The module path in a tensor name; None if it is not an IA3 vector's."""
    name = plain_name(name)
    if name.startswith(PREFIX) and name.endswith(SUFFIX):
        return name[len(PREFIX) : -len(SUFFIX)]
    return None


def _binds_to_nothing(
    name: str, tensors: Mapping[str, TensorInfo], base: BaseModelSpec
) -> TensorMismatch:
    hint = key_names.explain(tensors, lambda one: _path(one) in base.linear_modules)
    return _unbound(name, hint or f"expected {PREFIX}<module path>{SUFFIX}")


def _unbound(name: str, hint: str) -> TensorMismatch:
    return TensorMismatch(
        f"tensor {quoted(name)} binds to nothing; {hint}",
        field=name,
        expected=f"{PREFIX}<module path>{SUFFIX}",
        came=quoted(name),
    )


def _twice(paths: Mapping[str, str]) -> TensorMismatch:
    path = Counter(paths.values()).most_common(1)[0][0]
    return TensorMismatch(
        f"the checkpoint scales {quoted(path)} twice, with and without {ADAPTER_NAME!r} at the end of the "
        "name; expected one tensor for each module",
        field=PREFIX + path + SUFFIX,
        expected="one tensor for each module",
        came="two",
    )


# Which names a config gives: literal ones, a regular expression (never run), or none at all.
_Rule = frozenset[str] | str | None


def _rule(names: list[str] | str | None) -> _Rule:
    return frozenset(names) if isinstance(names, list) else names


def _plain_match(pattern: str, path: str) -> bool | None:
    """What PEFT's full match of a pattern with a path gives; None for a real regular expression.

    People write a module's name where PEFT expects a pattern of whole paths, and it matches nothing.
    """
    # Without quantifiers and groups, matching takes linear time.
    return bool(re.fullmatch(pattern, path)) if _PLAIN.fullmatch(pattern) else None


def _targets(rule: _Rule, path: str) -> bool | None:
    """Whether PEFT targets (or excludes) a path by this rule; None where that is not known."""
    if rule is None:
        return None
    if isinstance(rule, str):
        return True if rule.lower() == ALL_LINEAR else _plain_match(rule, path)
    return not rule.isdisjoint(dotted_endings(path))


def _feedforward_rule(config: IA3Config, base: BaseModelSpec) -> _Rule:
    """The names of feedforward modules; PEFT's default if unset."""
    if config.feedforward_modules is None and base.model_type in DEFAULT_TARGETS:
        return frozenset(DEFAULT_TARGETS[base.model_type][1])
    return _rule(config.feedforward_modules)


def _is_feedforward(name: str, info: TensorInfo, path: str, spec: LinearSpec, rule: _Rule) -> bool:
    """Which side a vector scales, determined by its shape; the config must agree."""
    output, feedforward = (spec.out_features, 1), (1, spec.in_features)
    if info.shape not in (output, feedforward):
        raise TensorMismatch(
            f"tensor {name!r} has shape {info.shape}, expected {output} to scale the output of "
            f"{path!r} or {feedforward} to scale its input{sharded(info)}",
            field=name,
            expected=f"{output} or {feedforward}",
            came=str(info.shape),
        )
    if isinstance(rule, str):
        listed = _plain_match(rule, path)
    else:
        listed = None if rule is None else ends_with_any(path, rule)
    if output == feedforward:  # a module of width 1
        return bool(listed)
    scales_input = info.shape == feedforward
    if listed is not None and listed != scales_input:
        side = "scales the input" if scales_input else "scales the output"
        raise TensorMismatch(
            f"tensor {name!r} of shape {info.shape} {side} of {path!r}, but feedforward_modules "
            f"({_shown(rule)}) {'names' if listed else 'does not name'} it",
            field=name,
            expected=str(feedforward if listed else output),
            came=str(info.shape),
        )
    return scales_input


def _shown(rule: _Rule) -> str:
    if isinstance(rule, str):
        return f"the pattern {quoted(rule)}"
    return some_of(sorted(rule or ())) or "none"


def _check_targets(config: IA3Config, paths: set[str], base: BaseModelSpec) -> tuple[str, ...]:
    """Check the targets against the bound paths; regular expressions are skipped.

    Returns:
        Warnings: entries that match nothing, which PEFT accepts.
    """
    names = config.target_modules
    if names is None and base.model_type in DEFAULT_TARGETS:
        names = DEFAULT_TARGETS[base.model_type][0]
    unmatched = _unmatched(names, base) if isinstance(names, list) else []
    if isinstance(names, list) and len(unmatched) == len(names):
        raise _target_not_found(names[0] if names else "", base)
    rule, excluded = _rule(names), _rule(config.exclude_modules)
    without_effect = sorted(
        path for path in paths if _targets(rule, path) is False or _targets(excluded, path)
    )
    if without_effect:
        raise TensorMismatch(
            f"the checkpoint scales {some_of(without_effect)}, which target_modules ({_shown(rule)}) does "
            "not name, or exclude_modules does: PEFT takes a module's name, or the end of its path after a "
            "dot, word for word, and loads the other tensors without effect",
            field="target_modules",
            expected=_shown(rule),
            came=some_of(without_effect),
        )
    if not isinstance(names, list) or names is not config.target_modules:
        return ()
    if not isinstance(config.exclude_modules, str):
        _check_none_missing(names, config.exclude_modules or [], paths, base)
    if not unmatched:
        return ()
    return (f"target_modules: {some_of(unmatched)} matches no module of the base",)


def _check_none_missing(
    names: list[str], excluded: list[str], paths: set[str], base: BaseModelSpec
) -> None:
    missing = [path for path in _targeted(names, excluded, base) if path not in paths]
    if missing:
        raise TensorMismatch(
            f"target_modules names {some_of(missing)}, for which the checkpoint has no tensor",
            field=PREFIX + missing[0] + SUFFIX,
            expected=some_of(missing),
            came="no such tensor",
        )


class IA3:
    """`AdapterMethod` of IA3."""

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    config_class: ClassVar[type[PeftConfig]] = IA3Config

    def stale(self, config: IA3Config, base: BaseModelSpec) -> tuple[str, ...]:
        """None: an IA3 config has no dimensions."""
        return ()

    def check(
        self, config: IA3Config, tensors: Mapping[str, TensorInfo], base: BaseModelSpec
    ) -> AdapterFacts:
        """Bind every tensor by name, decide its side by shape, cross-check the config's lists.

        Raises:
            MethodUnsupported: the task type or `modules_to_save`.
            TensorMismatch: a tensor is missing, left over, or of another dtype or shape.
            TargetNotFound: a tensor or every target names no linear module of the base.
        """
        check_task_type(config)
        check_modules_to_save(config.modules_to_save)
        check_dtypes(tensors)
        paths = bind_paths(tensors, base)
        warnings = _check_targets(config, set(paths.values()), base)
        feedforward = _feedforward_rule(config, base)
        for name, path in paths.items():
            _is_feedforward(name, tensors[name], path, base.linear_modules[path], feedforward)
        return AdapterFacts(num_virtual_tokens=0, uses_scales=True, warnings=warnings)

    def serving_form(
        self, config: IA3Config, tensors: Mapping[str, torch.Tensor], base: BaseModelSpec
    ) -> ActivationScales:
        """Vectors by module path, float32: inputs (in,) where feedforward, else outputs (out,).

        Raises:
            NonFinite: NaN or infinity among the vectors.
        """
        infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        feedforward = _feedforward_rule(config, base)
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        for name, path in bind_paths(infos, base).items():
            vector = to_float32(name, tensors[name]).flatten()
            spec = base.linear_modules[path]
            scales_input = _is_feedforward(name, infos[name], path, spec, feedforward)
            (inputs if scales_input else outputs)[path] = vector
        return ActivationScales(inputs=inputs, outputs=outputs)

    def export(self, module: nn.Module, config: IA3Config) -> dict[str, torch.Tensor]:
        """The vectors of a model that `attach_ia3` has wrapped; the module is the base itself.

        Raises:
            TypeError: the module carries no IA3.
            NonFinite: training has diverged.
        """
        layers = ia3_layers(module)
        if not layers:
            raise TypeError("expected a model with IA3 attached, came one without")
        return _export(layers)

    def num_trainable(self, config: IA3Config, base: BaseModelSpec) -> int:
        """One parameter per scaled input and output."""
        modules = base.linear_modules
        return sum(
            modules[path].in_features if is_feedforward else modules[path].out_features
            for path, is_feedforward in ia3_targets(config, base).items()
        )

    def trainable(
        self,
        config: IA3Config,
        frozen: FrozenBase,
        init_token_ids: Sequence[int] | None = None,
    ) -> TrainableScales:
        """Vectors of ones (or random ones, as the config says) around the base's modules."""
        if init_token_ids is not None:
            raise ValueError("IA3 has no virtual tokens to start from a text")
        return TrainableScales(frozen.model, config, frozen.spec)

    def complete_config(self, config: IA3Config, base: BaseModelSpec) -> IA3Config:
        """The config with its defaults set for this base, so that PEFT loads it.

        PEFT refuses feedforward names that are not among the targets, even those that it wrote
        itself; where the given names would be refused, both lists become full module paths.

        Raises:
            ConfigInvalid: an explicit feedforward name is no target's, and as `ia3_targets`.
            TargetNotFound: as `ia3_targets`.
        """
        targets = ia3_targets(config, base)
        names = _target_names(config, base)
        feedforward = _feedforward_names(config, base)
        if config.feedforward_modules is not None:
            _check_feedforward_used(feedforward, list(targets))
        scaled_inputs = [path for path, is_feedforward in targets.items() if is_feedforward]
        if not scaled_inputs:
            feedforward = []
        elif not set(feedforward) <= set(names):
            names, feedforward = list(targets), scaled_inputs
        kinds = {base.linear_modules[path].kind for path in targets}
        return config.model_copy(
            update={
                "target_modules": names,
                "feedforward_modules": feedforward,
                "fan_in_fan_out": "conv1d" in kinds,
            }
        )


class TrainableScales:
    """`Trainable` of IA3: the vectors of wrapped modules; no virtual tokens, no dropout."""

    targets: VirtualTargets | None = None

    def __init__(self, model: nn.Module, config: IA3Config, base: BaseModelSpec) -> None:
        self._model = model
        self._layers = attach_ia3(model, config, base)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained vectors by module path, see `Trainable.parameters`."""
        return {path: layer.ia3_l for path, layer in self._layers.items()}

    def virtual(self) -> None:
        """None: IA3 has no virtual tokens."""

    def set_training(self, training: bool) -> None:
        """IA3 has no dropout."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint as it stands, by `IA3.export`."""
        return _export(self._layers)

    def detach(self) -> None:
        """Restore the wrapped modules."""
        detach_ia3(self._model)


def _export(layers: Mapping[str, IA3Linear]) -> dict[str, torch.Tensor]:
    named = {PREFIX + path + SUFFIX: layer.ia3_l for path, layer in layers.items()}
    return {name: to_float32(name, vector) for name, vector in named.items()}


def _check_feedforward_used(names: list[str], targets: list[str]) -> None:
    for name in names:
        if not any(path.endswith(name) for path in targets):
            raise ConfigInvalid(
                f"feedforward_modules names {quoted(name)}, which is not among the targets "
                f"({some_of(targets)})",
                field="feedforward_modules",
                expected=some_of(targets),
                came=name,
            )


IA3_METHOD = IA3()
