"""Ten steps here and in PEFT with a plain torch loop: equal losses, for every method and option.

Equal initial weights and batches, float32, dropout 0, base in eval mode, rows padded on the right
there and packed here. What PEFT runs once a row (a soft prompt, CPT's context) runs once a step
here; the losses say that this changes nothing.
"""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.training.batches import Steps
from adapters.training.loop import train
from adapters.training.packed import PackedBase
from tests.adapters.training.tiny_jobs import VARIANTS, tiny_examples, tiny_job
from tests.benchmarks.peft_training import CONFIGS, padded
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_spec

STEPS = 10


def our_losses(architecture, job, examples):
    model = tiny_model(architecture)
    losses = []

    def note(event):
        if event.kind == "step":
            losses.append(event.data["loss"])

    train(job, examples, model, tiny_spec(model), on_event=note)
    return losses


def starting_weights(architecture, job):
    """What `train` starts from with this job's seed."""
    model = tiny_model(architecture)
    method = METHODS[job.peft_type]
    torch.manual_seed(job.hyperparameters.seed)
    config = parse_config(method.config_class, job.config)
    base = PackedBase(model, tiny_spec(model))
    trainable = method.trainable(config, base, job.init_token_ids)
    weights = {name: p.detach().clone() for name, p in trainable.parameters().items()}
    trainable.detach()
    return weights


def peft_model(architecture, job):
    """PEFT around a fresh base, with our starting weights, and its trained parameters."""
    given = {k: v for k, v in job.config.items() if k not in ("peft_type", "peft_version")}
    config = CONFIGS[job.peft_type](**{**given, "inference_mode": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(architecture), config).eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loaded = 0
    with torch.no_grad():
        for name, weights in starting_weights(architecture, job).items():
            (target,) = (
                p
                for n, p in named.items()
                if n.endswith((f"default.{name}", f"{name}.ia3_l.default"))
            )
            target.copy_(weights)
            loaded += target.numel()
    assert loaded == sum(p.numel() for p in named.values())
    return model, list(named.values())


def peft_losses(architecture, job, examples):
    model, parameters = peft_model(architecture, job)
    options = job.hyperparameters
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=options.learning_rate)
    else:
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, eps=options.adam_epsilon, weight_decay=0.0
        )
    plan = Steps.of(len(examples.train), options)
    losses = []
    for step in range(plan.max_steps):
        (rows,) = plan.batches(step)
        inputs = padded([examples.train[row] for row in rows])
        if job.peft_type != "CPT":
            del inputs["input_type_mask"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def options(optimizer):
    rate = {"adamw": 1e-2, "sgd": 0.01}[optimizer]
    return {
        "optimizer": optimizer,
        "learning_rate": rate,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "epochs": None,
        "max_steps": STEPS,
    }


# Every pair ran with both optimisers once; SGD on three architectures keeps the suite short.
CASES = [(a, "adamw") for a in ARCHITECTURES] + [(a, "sgd") for a in ("llama", "gpt2", "bloom")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("architecture", "optimizer"), CASES)
def test_losses_of_ten_steps_are_those_of_peft(architecture, variant, optimizer):
    spec = tiny_spec(tiny_model(architecture))
    job = tiny_job(variant, spec, **options(optimizer))
    examples = tiny_examples()
    ours = our_losses(architecture, job, examples)
    theirs = peft_losses(architecture, job, examples)
    assert len(ours) == STEPS
    assert max(theirs) - min(theirs) > 0.01, "nothing was learnt: the comparison says nothing"
    tolerance = {"sgd": 1e-5, "adamw": 1e-4}[optimizer]
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
