"""Whether a base can be served: its logits here against its own forward pass, at start.

Catches what cannot be known from a config: attention that never calls our function, arguments that we
do not know, positions that do not come from `position_ids`.
"""

from __future__ import annotations

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.errors import BaseUnsupported, reason_of
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk

_PROMPT_TOKENS = 24
# Mean error over all positions, as a share of the logits' standard deviation. (One position alone is too
# noisy in bfloat16: on a processor without AMX the default base's last one is off by 0.15 from float32,
# where the mean over all is 0.025 and that of transformers' variants 0.019 to 0.026.) Rounding stays well
# below it (in tiny models of every architecture: 1e-6, 0.002 and 0.02 at most); a token at a wrong
# position, an attention that was missed or a lost scale does not.
_TOLERANCES = {torch.float32: 0.005, torch.float16: 0.05}
_TOLERANCE = 0.15  # bfloat16


@torch.inference_mode()
def reference_logits(model: nn.Module, spec: BaseModelSpec) -> torch.Tensor:
    """The model's own logits (T, V) at every position of the probe prompt.

    To be taken before the model is connected to the engine's attention.

    Raises:
        BaseUnsupported: the model's own forward pass fails.
    """
    ids = torch.tensor([_probe_tokens(spec)], device=next(model.parameters()).device)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    except Exception as error:  # whatever a model's code raises
        raise _fails(spec, error) from error
    return logits.float().cpu()


def check_base(runner: ModelRunner, spec: BaseModelSpec, expected: torch.Tensor) -> None:
    """Run the probe prompt through the engine's path, in two chunks and a single token.

    Raises:
        BaseUnsupported: it fails, or its logits are not those of `reference_logits`.
    """
    try:
        got = _probe(runner, spec)
    except BaseUnsupported:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _fails(spec, error) from error
    error_share = float((got - expected).abs().mean() / expected.std().clamp(min=1e-6))
    allowed = _TOLERANCES.get(runner.dtype, _TOLERANCE)
    if not error_share <= allowed:
        raise BaseUnsupported(
            f"{spec.model_type} cannot be served: with KV in blocks and explicit positions its "
            f"logits are off by {error_share:.2g} of their spread (at most {allowed} is rounding)",
            expected=f"<= {allowed}",
            came=f"{error_share:.2g}",
        )


def _fails(spec: BaseModelSpec, error: Exception) -> BaseUnsupported:
    return BaseUnsupported(
        f"{spec.model_type} cannot be served: its forward pass failed ({reason_of(error)})"
    )


def _probe_tokens(spec: BaseModelSpec) -> list[int]:
    """A fixed prompt spread over the vocabulary; shorter where the base has fewer positions."""
    count = min(_PROMPT_TOKENS, spec.max_positions)
    return [(7919 * (i + 1)) % spec.vocab_size for i in range(count)]


def _probe(runner: ModelRunner, spec: BaseModelSpec) -> torch.Tensor:
    tokens = _probe_tokens(spec)
    sequence = Sequence.of(GenerationRequest("self-check", tuple(tokens)), arrival=0)
    # Blocks 0.. are free: nothing is served yet.
    sequence.block_ids = list(range(runner.blocks_for(len(tokens))))
    rows = []
    last = len(tokens) - 1
    middle = 2 * len(tokens) // 3
    for start, end in ((0, middle), (middle, last), (last, last + 1)):
        chunk = Chunk(sequence, start, end - start, samples=end == last + 1)
        (logits,) = runner.run([StepRows(chunk, None, num_logits=end - start)])
        rows.append(logits.float().cpu())
    return torch.cat(rows)
