"""Runs from their first step to their last: learning, going on, stopping, failing, cleaning up."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from adapters.errors import BaseMismatch, TrainingDiverged, TrainingError
from adapters.methods.ia3 import ia3_layers
from adapters.training.loop import Stopped, train
from adapters.training.state import STATE_FILE, load
from tests.adapters.training.tiny_jobs import CONFIGS, VARIANTS, tiny_examples, tiny_job
from tests.tiny_models import tiny_model, tiny_spec


class Boom(Exception):
    """Out of nowhere."""


class Run:
    """One call of `train` on a fresh base, and what it told."""

    def __init__(self, job, architecture="llama", examples=None, model=None, on_event=None, **kw):
        self.events = []
        self.trained = None
        self._on_event = on_event
        model = model or tiny_model(architecture)
        # What happened to be drawn before must not matter.
        torch.manual_seed(len(self.events) + 12345)
        self.trained = train(
            job,
            examples or tiny_examples(),
            model,
            tiny_spec(model),
            on_event=self._note,
            **kw,
        )

    def _note(self, event):
        self.events.append(event)
        if self._on_event:
            self._on_event(event)

    def data(self, kind):
        return [event.data for event in self.events if event.kind == kind]

    @property
    def losses(self):
        return [data["loss"] for data in self.data("step")]


def spec():
    return tiny_spec(tiny_model("llama"))


def asked(times):
    """A `should_stop` that says yes at its `times`-th call."""
    calls = iter(range(times - 1))
    return lambda: next(calls, None) is None


def assert_same(one, other):
    assert one.config == other.config
    assert one.metrics == other.metrics
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


# --- going on -------------------------------------------------------------------------------

KEPT = {"early_stopping_patience": 2, "learning_rate": 0.2, "epochs": 6}
RESUMED = {
    "accumulation, best kept": {**KEPT, "batch_size": 2, "gradient_accumulation_steps": 2},
    "sgd": {"optimizer": "sgd"},
}
CASES = [(variant, "accumulation, best kept") for variant in VARIANTS]
CASES += [(variant, "sgd") for variant in ("prefix", "p-tuning-lstm", "ia3", "cpt")]
DROPOUT = {"encoder_dropout": 0.3}


def job_of(variant, **options):
    job = tiny_job(variant, spec(), **options)
    if variant == "p-tuning-lstm":
        job = job.model_copy(update={"config": {**job.config, **DROPOUT}})
    return job


def interrupted(job, state_dir, every, on_event=None):
    """The same job, stopped again and again after so many questions, until it is through."""
    for _ in range(100):
        try:
            return Run(
                job,
                state_dir=state_dir,
                checkpoint_seconds=0,
                should_stop=asked(every),
                on_event=on_event,
            )
        except Stopped:
            assert load(state_dir) is not None
    raise AssertionError("the run makes no progress")


@pytest.mark.parametrize(("variant", "options"), CASES)
def test_an_interrupted_run_ends_in_the_same_bits(variant, options, tmp_path):
    job = job_of(variant, **RESUMED[options])
    undisturbed = Run(job)
    told = []
    # An epoch asks between 8 and 13 times: stops fall on steps, amid steps, amid evaluations.
    gone_on = interrupted(job, tmp_path, 7, told.append)
    assert_same(gone_on.trained, undisturbed.trained)
    starts = [event.kind for event in told if event.kind in ("started", "resumed")]
    assert starts[0] == "started"
    assert len(starts) > 2
    assert set(starts[1:]) == {"resumed"}
    # A step that was done twice gave the same loss twice.
    losses = {}
    for event in told:
        if event.kind == "step":
            losses.setdefault(event.data["step"], set()).add(event.data["loss"])
    assert [losses[step] for step in sorted(losses)] == [{loss} for loss in undisturbed.losses]


def test_dropout_is_on_in_steps_and_off_in_evaluations(tmp_path):
    dropping, plain = job_of("p-tuning-lstm"), tiny_job("p-tuning-lstm", spec())
    first = Run(dropping), Run(plain)
    assert first[0].losses[0] != first[1].losses[0], "dropout does nothing"
    # A rate of nearly 0: the weights stay, so that only dropout could move the evaluations.
    still = {"learning_rate": 1e-30, "lr_scheduler_type": "constant"}
    run = Run(job_of("p-tuning-lstm", **still))
    assert len({data["loss"] for data in run.data("evaluation")}) == 1
    calm = Run(tiny_job("p-tuning-lstm", spec(), **still))
    assert run.data("evaluation")[0]["loss"] == calm.data("evaluation")[0]["loss"]
    assert len(set(run.losses[0::3])) == 4


def test_a_finished_run_that_is_asked_for_again_gives_the_same(tmp_path):
    job = job_of("prefix", early_stopping_patience=1, learning_rate=0.2)
    first = Run(job, state_dir=tmp_path, checkpoint_seconds=0)
    again = Run(job, state_dir=tmp_path, checkpoint_seconds=0)
    assert_same(again.trained, first.trained)
    assert again.data("step") == []


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """No chance to save, unlike a stop: an exception out of nowhere."""
    job = job_of("p-tuning-lstm")

    def kill(event):
        if event.kind == "step" and event.data["step"] == 7:
            raise Boom

    with pytest.raises(Boom):
        Run(job, state_dir=tmp_path, checkpoint_seconds=0, on_event=kill)
    assert load(tmp_path).step == 6
    gone_on = Run(job, state_dir=tmp_path, checkpoint_seconds=0)
    assert_same(gone_on.trained, Run(job).trained)
    assert gone_on.data("resumed")[0]["step"] == 6


def test_checkpoints_come_when_their_time_has(tmp_path):
    job = tiny_job("prefix", spec())
    seldom = Run(job, state_dir=tmp_path / "a", checkpoint_seconds=3600)
    assert seldom.data("checkpoint") == []
    always = Run(job, state_dir=tmp_path / "b", checkpoint_seconds=0)
    assert [data["step"] for data in always.data("checkpoint")] == list(range(1, 13))
    assert Run(job).data("checkpoint") == []
    assert_same(seldom.trained, always.trained)


def test_a_stop_without_a_place_for_checkpoints():
    with pytest.raises(Stopped):
        Run(tiny_job("prefix", spec()), should_stop=asked(5))


# --- what is done ---------------------------------------------------------------------------

# Where a delta is bounded (CPT), a wide bound: `tiny_job`'s own is there to be reached.
WIDE = {"opt_projection_epsilon": 30.0, "opt_projection_format_epsilon": 30.0}
RATES = {"p-tuning-mlp": 0.01, "p-tuning-lstm": 0.01, "prefix-projection": 0.01}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls(variant, architecture):
    base = tiny_spec(tiny_model(architecture))
    job = tiny_job(variant, base, epochs=15, learning_rate=RATES.get(variant, 0.1))
    if job.peft_type == "CPT":
        job = job.model_copy(update={"config": {**job.config, **WIDE}})
    run = Run(job, architecture)
    assert len(run.losses) == 45
    assert all(map(math.isfinite, run.losses))
    first, last = sum(run.losses[:3]) / 3, sum(run.losses[-3:]) / 3
    assert last < 0.8 * first, (first, last)
    assert run.trained.metrics["loss"] == pytest.approx(last)


def test_events_and_metrics_say_what_happened():
    job = tiny_job("prefix", spec(), epochs=2, warmup_ratio=0.5)
    run = Run(job)
    assert [event.kind for event in run.events] == [
        "started", "step", "step", "step", "evaluation", "step", "step", "step", "evaluation",
    ]  # fmt: skip
    assert run.data("started") == [
        {
            "max_steps": 6,
            "num_rows": 10,
            "num_held_out": 4,
            "trainable_params": job.trainable_params,
        }
    ]
    steps = run.data("step")
    assert [data["step"] for data in steps] == [1, 2, 3, 4, 5, 6]
    assert [data["epoch"] for data in steps] == [1, 1, 1, 2, 2, 2]
    rates = [data["learning_rate"] for data in steps]
    assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2, 2e-2 / 3, 1e-2 / 3])
    assert all(data["tokens_per_second"] > 0 for data in steps)
    assert [data["seconds_left"] > 0 for data in steps] == [True] * 5 + [False]
    last = run.data("evaluation")[-1]
    assert (last["step"], last["epoch"], last["num_rows"]) == (6, 2, 4)
    assert run.trained.metrics == {
        "loss": pytest.approx(sum(run.losses[3:]) / 3),
        "steps": 6,
        "epochs": 2,
        "num_rows": 10,
        "num_tokens": 2 * sum(example.num_tokens for example in tiny_examples().train),
        "evaluation": last,
    }


def test_without_labels_or_held_out_rows():
    job = tiny_job("prefix", spec(), epochs=1)
    examples = tiny_examples()
    without = type(examples)(examples.train, examples.held_out, None)
    (evaluation,) = Run(job, examples=without).data("evaluation")
    assert sorted(evaluation) == ["epoch", "loss", "num_rows", "step"]
    run = Run(job, examples=tiny_examples(num_held_out=0))
    assert run.data("evaluation") == []
    assert "evaluation" not in run.trained.metrics
    assert (
        "on_training_rows" not in Run(job, examples=replace(without, held_out=[])).trained.metrics
    )


@pytest.mark.parametrize("num_held_out", [0, 4])
def test_an_adapter_no_better_than_the_commonest_label_says_so(num_held_out):
    # Nothing is learned, and nearly all rows have one label, which the base rarely answers: it cannot
    # answer each of three labels most of the time.
    job = tiny_job("prefix", spec(), epochs=1, learning_rate=1e-20)
    given = tiny_examples(num_held_out=num_held_out)
    kind = "held-out" if num_held_out else "training"
    num_warned = 0
    for label in range(3):
        skewed = replace(
            given,
            train=with_label(given.train, label),
            held_out=with_label(given.held_out, label),
        )
        metrics = Run(job, examples=skewed).trained.metrics
        found = metrics["evaluation" if num_held_out else "on_training_rows"]
        count = num_held_out or len(given.train)
        assert (found["num_rows"], found["commonest_share"]) == (count, (count - 1) / count)
        is_better = found["accuracy"] > found["commonest_share"]
        assert ("warning" in metrics) is not is_better
        if not is_better:
            num_warned += 1
            words = f"accuracy {found['accuracy']:.3f} on {count} {kind} rows"
            assert words in metrics["warning"]
    assert num_warned >= 2


def with_label(examples, label):
    """All but the first of them have this label."""
    return [replace(one, label=label if n else (label + 1) % 3) for n, one in enumerate(examples)]


def test_an_evaluation_changes_no_step():
    job = tiny_job("cpt", spec())
    assert Run(job).losses == pytest.approx(
        Run(job, examples=tiny_examples(10, 0)).losses, rel=1e-4
    )


def test_early_stopping_keeps_the_best(tmp_path):
    # A rate at which it gets worse at once, and rows whose labels say nothing.
    job = tiny_job("prefix", spec(), epochs=30, learning_rate=0.5, early_stopping_patience=2)
    run = Run(job)
    evaluations = run.data("evaluation")
    order = [(data["accuracy"], -data["loss"]) for data in evaluations]
    best = order.index(max(order))
    assert best == len(order) - 3, "two evaluations without a better one end the run"
    assert len(order) < 30
    assert run.trained.metrics["evaluation"] == evaluations[best]
    assert run.trained.metrics["steps"] == 3 * len(order)
    # The tensors are those of that moment.
    best_step = evaluations[best]["step"]

    def end(event):
        if event.kind == "checkpoint" and event.data["step"] == best_step:
            raise Boom

    with pytest.raises(Boom):
        Run(job, state_dir=tmp_path, checkpoint_seconds=0, on_event=end)
    then = load(tmp_path).parameters["embedding.weight"]
    assert torch.equal(run.trained.tensors["prompt_embeddings"], then)


@pytest.mark.parametrize("variant", ["prefix", "p-tuning-mlp", "ia3", "cpt-decay"])
def test_accumulation_is_a_larger_batch(variant):
    whole = Run(tiny_job(variant, spec(), batch_size=8))
    split = Run(tiny_job(variant, spec(), batch_size=2, gradient_accumulation_steps=4))
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    for name, tensor in whole.trained.tensors.items():
        torch.testing.assert_close(split.trained.tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_to_their_norm():
    """Plain SGD at rate 1 moves the weights by exactly the clipped gradient."""
    options = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": None, "max_steps": 1}

    def moved(max_grad_norm):
        job = tiny_job(
            "prompt-tuning", spec(), **options, max_grad_norm=max_grad_norm, warmup_ratio=0.0
        )
        still = tiny_job("prompt-tuning", spec(), **{**options, "learning_rate": 1e-30})
        end, start = (Run(one).trained.tensors["prompt_embeddings"] for one in (job, still))
        return float((end - start).norm())

    free = moved(0.0)
    assert free > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(1e9) == pytest.approx(free, rel=1e-6)


def test_the_seed_decides():
    def tensors(seed):
        return Run(tiny_job("prefix", spec(), seed=seed)).trained.tensors["prompt_embeddings"]

    assert torch.equal(tensors(1), tensors(1))
    assert not torch.equal(tensors(1), tensors(2))


# --- failing --------------------------------------------------------------------------------


# GPT-2's norms make NaN of what is too large; those of Llama make 0 of it. CPT is bounded.
SPOILED = ["prefix", "ia3", "prompt-tuning", "p-tuning-mlp", "p-tuning-lstm"]


def spoiled(variant, **options):
    base = tiny_spec(tiny_model("gpt2"))
    return tiny_job(variant, base, learning_rate=1e30, lr_scheduler_type="constant", **options)


@pytest.mark.parametrize("variant", SPOILED)
def test_a_loss_that_is_no_number_ends_the_run(variant):
    told = []
    with pytest.raises(TrainingDiverged, match=r"step 2 is nan; .* below 1e\+30") as caught:
        Run(spoiled(variant), "gpt2", on_event=told.append)
    assert caught.value.field == "hyperparameters.learning_rate"
    assert [event.kind for event in told] == ["started", "step"]


@pytest.mark.parametrize("num_held_out", [0, 4])
@pytest.mark.parametrize("variant", SPOILED)
def test_what_the_last_step_spoils_is_not_handed_out(variant, num_held_out):
    """The loss before the only step is fine; only a look at what came of it can tell."""
    told = []
    job = spoiled(variant, epochs=None, max_steps=1)
    with pytest.raises(TrainingDiverged):
        Run(job, "gpt2", tiny_examples(num_held_out=num_held_out), on_event=told.append)
    # Events are JSON, which has no NaN.
    assert all(math.isfinite(e.data["loss"]) for e in told if "loss" in e.data)


def test_another_base_is_refused():
    job = tiny_job("prefix", spec()).model_copy(update={"base_digest": "another"})
    with pytest.raises(BaseMismatch) as caught:
        Run(job)
    assert (caught.value.expected, caught.value.came) == ("another", "tiny-llama")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="damaged"):
        Run(tiny_job("ia3", spec()), state_dir=tmp_path)


# --- what is left behind --------------------------------------------------------------------


def fingerprint(model):
    """Every module by identity and every weight by value."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    modules = [(name, id(module)) for name, module in model.named_modules()]
    return digest.hexdigest(), modules, model.training


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_the_base_is_left_as_it_was_found(variant, architecture):
    model = tiny_model(architecture)
    job = tiny_job(variant, tiny_spec(model), epochs=1)
    before = fingerprint(model)

    def boom(event):
        if event.kind == kind:
            assert bool(ia3_layers(model)) == (job.peft_type == "IA3")
            raise Boom

    first = Run(job, model=model).trained
    assert fingerprint(model) == before
    for kind in ("started", "step", "evaluation"):  # noqa: B007  (`boom` reads it)
        with pytest.raises(Boom):
            Run(job, model=model, on_event=boom)
        assert fingerprint(model) == before
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    # And it can be trained on again, with the same outcome.
    assert_same(Run(job, model=model).trained, first)


def test_a_checkpoint_that_does_not_fit_leaves_the_base_unwrapped(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"no checkpoint")
    model = tiny_model("llama")
    with pytest.raises(TrainingError):
        Run(tiny_job("ia3", spec()), model=model, state_dir=tmp_path)
    assert not ia3_layers(model)


@pytest.mark.parametrize("variant", ["p-tuning-lstm", "ia3-random", "prefix"])
def test_the_global_generator_is_left_alone(variant):
    model = tiny_model("llama")
    base = tiny_spec(model)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    job = job_of(variant, epochs=1)
    torch.set_rng_state(before)
    train(job, tiny_examples(), model, base, on_event=lambda _: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_written_can_be_read(tmp_path):
    from adapters.checkpoint.folder import load_serving_form
    from adapters.checkpoint.limits import CheckpointLimits

    trained = Run(tiny_job("prefix", spec(), epochs=1)).trained
    trained.write(tmp_path / "adapter")
    form = load_serving_form(tmp_path / "adapter", spec(), CheckpointLimits())
    assert form.num_virtual_tokens == 7
