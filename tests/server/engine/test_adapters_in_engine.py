"""Adapters of every kind in one engine: too many of them, too little KV, damage, restarts.

A tiny Llama, checkpoints made by PEFT. What is right is what a request gives alone in a roomy engine;
that this is also what PEFT gives is the conformance grid's affair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.parts import KVPrefix, SoftPrompt
from server.engine.adapter_slots import Residency
from server.engine.kv_cache import KVBlocks
from server.engine.request import (
    AdapterRef,
    FailedEvent,
    ResidencyEvent,
    TokenEvent,
)
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import TINY, adapter_ref, request, run, tiny_engine, tokens
from tests.tiny_models import tiny_model, tiny_spec

VARIANTS = ("prefix", "p-tuning-mlp", "cpt", "prompt-tuning", "ia3", "ia3-output-side")
SOFT = ("p-tuning-mlp", "cpt", "prompt-tuning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of each variant: digest -> directory."""
    out = {}
    for variant in VARIANTS:
        for seed in (1, 2):
            digest = f"{variant}-{seed}"
            out[digest] = tmp_path_factory.mktemp(digest)
            make_adapter(tiny_model("llama"), "llama", variant, out[digest], seed)
    perturb(out)
    return out


def perturb(folders):
    """The second of a variant must differ from the first: PEFT's random state is the same."""
    for digest, folder in folders.items():
        if not digest.endswith("-2"):
            continue
        tensors = load_file(folder / "adapter_model.safetensors")
        for index, (name, tensor) in enumerate(tensors.items()):
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(index)
                tensors[name] = tensor + 0.4 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def start(folders):
    """Makes engines that are closed in the end."""
    engines = []

    def make(read_form=None, **changes):
        config = dataclasses.replace(TINY, **changes)
        engine = tiny_engine(tiny_model("llama"), folders, config, read_form)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def refs(folders):
    engine = tiny_engine(tiny_model("llama"), folders)
    engine.close()
    return {digest: adapter_ref(digest, folder, engine) for digest, folder in folders.items()}


def mixed_load(refs, count, **options):
    """Requests over all adapters and the base, of different lengths, greedy and sampled."""
    adapters = [None, *refs.values()]
    requests = []
    for i in range(count):
        sampling = {"do_sample": True, "seed": i, "temperature": 1.3} if i % 3 == 1 else {}
        prompt = prompt_ids(5 + (7 * i) % 40, seed=i)
        adapter = adapters[i % len(adapters)]
        new = 8 + (5 * i) % 20
        requests.append(request(f"r{i}", prompt, adapter, new, **sampling, **options))
    return requests


@pytest.fixture(scope="module")
def solo(folders, refs):
    """What each request of `mixed_load(refs, 39)` gives alone."""
    engine = tiny_engine(tiny_model("llama"), folders)
    out = {}
    for one in mixed_load(refs, 39):
        out.update({key: tokens(value) for key, value in run(engine, [one]).items()})
    engine.close()
    return out


def check(events, solo):
    assert {key: tokens(value) for key, value in events.items()} == solo
    for stream in events.values():
        reasons = [event.finish_reason for event in stream]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] == "length"


def kv_bytes(num_blocks):
    spec = tiny_spec(tiny_model("llama"))
    return num_blocks * KVBlocks.bytes_per_block(spec, TINY.block_size, torch.float32)


def blocks_of(requests):
    size = TINY.block_size
    return sum(
        -(-(len(one.prompt_token_ids) + one.sampling.max_new_tokens) // size) for one in requests
    )


# --- company ---------------------------------------------------------------------------------


def test_the_adapters_differ(refs, start):
    engine = start()
    prompt = prompt_ids(9)
    load = [request(str(a and a.digest), prompt, a) for a in [None, *refs.values()]]
    outputs = {tuple(tokens(stream)) for stream in run(engine, load).values()}
    assert len(outputs) == len(refs) + 1


def test_all_together_give_what_each_gives_alone(refs, solo, start):
    check(run(start(), mixed_load(refs, 39)), solo)


@pytest.mark.parametrize("fast_kernels", [True, False])
def test_joining_and_leaving_midway_changes_nobodys_tokens(refs, solo, start, fast_kernels):
    engine = start(fast_kernels=fast_kernels)
    waiting = mixed_load(refs, 39)
    aborted = {f"r{i}" for i in range(4, 39, 9)}
    events: dict[str, list[TokenEvent]] = {}
    for step in range(2000):
        if step % 2 == 0 and waiting:
            assert not engine.submit(waiting.pop(0))
        if not waiting and not engine.has_work:
            break
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event
            if isinstance(event, TokenEvent):
                events.setdefault(event.request_id, []).append(event)
        for request_id in aborted:
            if len(events.get(request_id, ())) == 3:
                engine.abort(request_id)
        engine.scheduler.check_integrity()
    assert not waiting
    for request_id, stream in events.items():
        if request_id in aborted:
            assert tokens(stream) == solo[request_id][:3]
        else:
            assert tokens(stream) == solo[request_id]
    assert len(events) == 39


def test_a_seed_gives_the_same_tokens_whatever_the_batch(refs, start):
    prompt = prompt_ids(12)
    adapter = refs["cpt-1"]
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 99}
    alone = run(start(), [request("s", prompt, adapter, 24, **options)])["s"]
    engine = start()
    crowd = mixed_load(refs, 20)
    together = run(engine, [*crowd[:10], request("s", prompt, adapter, 24, **options), *crowd[10:]])
    assert tokens(together["s"]) == tokens(alone)
    other = run(engine, [request("s", prompt, adapter, 24, **{**options, "seed": 100})])["s"]
    assert tokens(other) != tokens(alone)


# --- too little room -------------------------------------------------------------------------


@pytest.mark.parametrize("max_running", [32, 6])
def test_kv_for_a_third_of_the_load_gives_the_same_tokens(refs, solo, start, max_running):
    load = mixed_load(refs, 39)
    # What runs at once wants so many blocks; a third of them is there.
    at_once = sorted((blocks_of([one]) for one in load), reverse=True)[:max_running]
    engine = start(kv_bytes=kv_bytes(sum(at_once) // 3), max_running=max_running)
    check(run(engine, load), solo)
    assert engine.scheduler.num_preemptions > 0


def test_logprobs_of_a_preempted_prompt_are_whole(refs, start):
    load = [
        request(f"r{i}", prompt_ids(40, seed=i), a, 20, prompt_logprobs=True, num_logprobs=1)
        for i, a in enumerate([None, *refs.values()])
    ]
    expected = run(start(), load)
    engine = start(kv_bytes=kv_bytes(blocks_of(load) // 3))
    got = run(engine, load)
    assert engine.scheduler.num_preemptions > 0
    for one in load:
        ours, theirs = got[one.request_id], expected[one.request_id]
        assert tokens(ours) == tokens(theirs)
        assert [event.prompt_logprobs is not None for event in ours] == [True] + [False] * 19
        assert len(ours[0].prompt_logprobs) == 40
        assert ours[0].prompt_logprobs[0] is None
        numbers = [
            [entry.logprob for entry in events[0].prompt_logprobs[1:]] for events in (ours, theirs)
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


POLICIES = {
    "one adapter a step": {"batching": "per-adapter"},
    "one adapter a step, and little KV": {"batching": "per-adapter", "kv_bytes": kv_bytes(60)},
    "one chunk beside streams": {"prefill_tokens_beside": 16},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_tokens_of_the_request_alone(refs, solo, start, policy):
    engine = start(**POLICIES[policy])
    check(run(engine, mixed_load(refs, 39)), solo)
    assert (engine.scheduler.num_preemptions > 0) == ("kv_bytes" in POLICIES[policy])


TOO_SMALL = {
    "one at a time": {"adapter_kv_share": 0.02, "scale_slots": 1},
    "host memory for one": {"host_bytes": 1},
    "nothing fits": {"adapter_kv_share": 0.02, "scale_slots": 1, "host_bytes": 1},
    "all of it, and little KV": {
        "adapter_kv_share": 0.2,
        "scale_slots": 1,
        "host_bytes": 1,
        "kv_bytes": kv_bytes(20),
    },
    "few run": {"host_bytes": 1, "scale_slots": 1, "max_running": 2},
}


@pytest.mark.parametrize("case", TOO_SMALL)
@pytest.mark.parametrize("keeps_folds", [False, True])
def test_more_adapters_than_fit_are_all_served(refs, solo, start, tmp_path, case, keeps_folds):
    changes = dict(TOO_SMALL[case])
    if "kv_bytes" not in changes:
        changes["kv_bytes"] = kv_bytes(150)
    if keeps_folds:
        changes["folds_dir"] = str(tmp_path / "folds")
    engine = start(**changes)
    check(run(engine, mixed_load(refs, 39)), solo)
    if "scale_slots" in changes:
        assert engine.scheduler.slots.num_evictions > 0
    assert not engine.scheduler.running


def test_little_is_read_ahead_only_to_be_dropped(refs, solo, start, folders):
    reader = Reader(folders)
    check(run(start(reader, host_bytes=1), mixed_load(refs, 39)), solo)
    # All fit the device: about once for each is enough, though host memory holds one at a time.
    assert len(folders) <= reader.counts.total() <= 2 * len(folders)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("cut short", "adapter_corrupt"),
        ("gone", "adapter_corrupt"),
        ("other shape", "adapter_not_loaded"),  # a whole file that does not fit the base
        ("not finite", "adapter_not_loaded"),
    ],
)
def test_a_corrupt_adapter_fails_alone(refs, solo, start, folders, tmp_path, damage, code):
    bad = tmp_path / "bad"
    shutil.copytree(folders["prefix-1"], bad)
    file = bad / "adapter_model.safetensors"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    elif damage == "other shape":
        shutil.copy(folders["cpt-1"] / "adapter_model.safetensors", file)
    else:
        data = bytearray(file.read_bytes())
        data[-4:] = b"\x00\x00\xc0\x7f"
        file.write_bytes(bytes(data))
    spec = tiny_spec(tiny_model("llama"))

    def read(digest):
        return load_serving_form({**folders, "bad": bad}[digest], spec, CheckpointLimits())

    engine = start(read)
    broken = AdapterRef("bad", 7, uses_scales=False)
    load = mixed_load(refs, 13)
    events, failures = drive(
        engine, [*load, *(request(f"bad{i}", prompt_ids(9), broken) for i in range(3))]
    )
    assert {failure.request_id for failure in failures} == {"bad0", "bad1", "bad2"}
    assert {failure.code for failure in failures} == {code}
    assert all(len(failure.message) > 30 for failure in failures)
    check(events, {one.request_id: solo[one.request_id] for one in load})
    # Put right, it is read again.
    shutil.rmtree(bad)
    shutil.copytree(folders["prefix-1"], bad)
    again = run(engine, [request("again", prompt_ids(9), broken)])["again"]
    good = run(engine, [request("good", prompt_ids(9), refs["prefix-1"])])["good"]
    assert tokens(again) == tokens(good)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("y"), MemoryError(), EOFError()])
def test_whatever_reading_raises_the_request_ends(start, error):
    def read(_digest):
        raise error

    engine = start(read)
    _, (failure,) = drive(
        engine, [request("r", prompt_ids(9), AdapterRef("bad", 7, uses_scales=False))], 200
    )
    assert failure.code == "adapter_not_loaded"


@pytest.mark.parametrize(
    ("came", "record", "sentence"),
    [
        ("prefix-1", (9, False), "expected 9 virtual tokens, came 7 virtual tokens"),
        ("cpt-1", (7, False), "expected 7 virtual tokens, came 9 virtual tokens"),
        ("ia3-1", (7, False), "expected 7 virtual tokens, came scales"),
        ("prefix-1", (0, True), "expected scales, came 7 virtual tokens"),
    ],
)
def test_an_adapter_that_is_not_what_its_record_says_is_corrupt(
    refs, solo, start, folders, came, record, sentence
):
    spec = tiny_spec(tiny_model("llama"))
    named = {**folders, "odd": folders[came]}
    engine = start(lambda digest: load_serving_form(named[digest], spec, CheckpointLimits()))
    load = mixed_load(refs, 13)
    odd = request("odd", prompt_ids(9), AdapterRef("odd", *record))
    events, (failure,) = drive(engine, [odd, *load])
    assert failure.code == "adapter_corrupt"
    assert sentence in failure.message
    check(events, {one.request_id: solo[one.request_id] for one in load})


# --- faults of a step ------------------------------------------------------------------------


class Fault:
    """Raises `error` at the forward passes for which `when` holds; `None` asks for too much memory."""

    def __init__(self):
        self.error = None
        self.when = lambda: False
        self.num_calls = 0

    def __call__(self, *_):
        self.num_calls += 1
        if self.when():
            if self.error is not None:
                raise self.error
            torch.empty(1 << 60, dtype=torch.uint8)


@pytest.fixture
def faulty(folders):
    """An engine and the fault in its forward pass, which begins with the embeddings."""
    model, fault = tiny_model("llama"), Fault()
    engine = tiny_engine(model, folders)
    model.get_input_embeddings().register_forward_pre_hook(fault)
    yield engine, fault
    engine.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
        (IndexError("out of range"), "out of range"),
    ],
    ids=["allocator", "cuda", "host", "index"],
)
def test_a_step_that_fails_at_every_size_ends_its_own_rows_only(refs, solo, faulty, error, words):
    engine, fault = faulty
    # From the twelfth pass on, until so many were tried as make it a whole step in halves.
    fault.error, fault.when = error, lambda: 12 <= fault.num_calls < 12 + 40
    events, failures = drive(engine, mixed_load(refs, 39))
    failed = {failure.request_id for failure in failures}
    assert 0 < len(failed) < 39
    assert {failure.code for failure in failures} == {"engine_error"}
    assert all(words in failure.message for failure in failures)
    whole = {key: stream for key, stream in events.items() if key not in failed}
    check(whole, {key: value for key, value in solo.items() if key not in failed})


@pytest.mark.parametrize(
    "error",
    [None, torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), IndexError("out of range")],
    ids=["allocator", "cuda", "host", "index"],
)
def test_a_step_that_fails_once_is_computed_in_halves_and_nobody_fails(refs, solo, faulty, error):
    engine, fault = faulty
    fault.error, fault.when = error, lambda: fault.num_calls % 5 == 0
    load = mixed_load(refs, 39)
    events, failures = drive(engine, load)
    alone = {failure.request_id for failure in failures}  # a step of one row has no halves
    assert len(alone) < 20
    whole = {key: stream for key, stream in events.items() if key not in alone}
    check(whole, {one.request_id: solo[one.request_id] for one in load if one.request_id in whole})


def test_a_fold_that_always_fails_is_given_up(refs, solo, faulty):
    engine, fault = faulty
    folding = engine.scheduler.running
    fault.error = RuntimeError("the fold's own fault")
    fault.when = lambda: any(sequence.fold_digest == "cpt-1" for sequence in folding)
    counts, on_step = count_folds(engine)
    load = [request(f"cpt{i}", prompt_ids(9), refs["cpt-1"], 8) for i in range(3)]
    _, failures = drive(engine, load, 200, on_step)
    assert {failure.request_id for failure in failures} == {"cpt0", "cpt1", "cpt2"}
    assert {failure.code for failure in failures} == {"adapter_not_loaded"}
    assert all("the fold's own fault" in failure.message for failure in failures)
    assert counts == {"cpt-1": 2}
    # Once it can be folded it is served.
    fault.when = lambda: False
    load = mixed_load(refs, 13)
    check(run(engine, load), {one.request_id: solo[one.request_id] for one in load})


def test_a_fold_that_fails_once_is_tried_again(refs, solo, faulty):
    engine, fault = faulty
    fault.error, fault.when = RuntimeError("once"), lambda: fault.num_calls == 1
    load = [one for one in mixed_load(refs, 39) if one.adapter == refs["cpt-1"]]
    check(run(engine, load), {one.request_id: solo[one.request_id] for one in load})


def test_a_row_whose_token_cannot_be_chosen_does_not_stop_the_engine(refs, solo, start, caplog):
    engine = start()
    odd = request("odd", prompt_ids(9), None, do_sample=True, temperature="hot")
    _, (failure,) = drive(engine, [odd])
    assert failure.code == "engine_error"
    assert "choosing the next token failed" in failure.message
    assert "choosing the next token failed" in caplog.text
    load = mixed_load(refs, 13)
    events, (failure,) = drive(engine, [*load[:5], odd, *load[5:]])  # nor anybody in its company
    assert failure.request_id == "odd"
    check(events, {one.request_id: solo[one.request_id] for one in load})


def test_an_adapter_that_cannot_be_installed_fails_its_own_rows_only(refs, solo, start, folders):
    spec = tiny_spec(tiny_model("llama"))

    def read(digest):
        form = load_serving_form(folders[digest], spec, CheckpointLimits())
        # Right in every shape, and nothing there to copy.
        return KVPrefix(form.keys.to("meta"), form.values) if digest == "prefix-1" else form

    engine = start(read)
    load = mixed_load(refs, 39)
    events, failures = drive(engine, load)
    bad = {one.request_id for one in load if one.adapter == refs["prefix-1"]}
    assert {failure.request_id for failure in failures} == bad
    assert {failure.code for failure in failures} == {"engine_error"}
    check(events, {key: value for key, value in solo.items() if key not in bad})
    assert engine.scheduler.slots.entries["prefix-1"].residency is not Residency.DEVICE


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_kv_memory_without_room_for_a_short_sequence_is_refused(start, num_blocks):
    least = kv_bytes(4)
    assert start(kv_bytes=least).limits.num_blocks == 4
    with pytest.raises(ValueError, match=f"kv_bytes is .*, expected at least {least}"):
        start(kv_bytes=kv_bytes(num_blocks))


def drive(engine, requests, max_steps=5000, on_step=lambda step: None):
    """Like `run`, but failures are collected."""
    events, failures = {}, []
    for one in requests:
        assert not engine.submit(one)
    for step in range(max_steps):
        if not engine.has_work:
            return events, failures
        for event in engine.step():
            if isinstance(event, FailedEvent):
                failures.append(event)
            elif isinstance(event, TokenEvent):
                events.setdefault(event.request_id, []).append(event)
        engine.scheduler.check_integrity()
        on_step(step)
    raise AssertionError(f"work is left after {max_steps} steps")


# --- folds -----------------------------------------------------------------------------------


class Reader:
    """Reads checkpoints and counts them."""

    def __init__(self, folders):
        self.counts = Counter()
        self._folders = folders
        self._spec = tiny_spec(tiny_model("llama"))

    def __call__(self, digest):
        self.counts[digest] += 1
        return load_serving_form(self._folders[digest], self._spec, CheckpointLimits())


def count_folds(engine):
    """A counter by digest, and a callback of `run` that fills it."""
    seen = set()
    counts = Counter()

    def on_step(_step):
        for sequence in engine.scheduler.running:
            if sequence.fold_digest is not None and sequence.arrival not in seen:
                seen.add(sequence.arrival)
                counts[sequence.fold_digest] += 1

    return counts, on_step


def test_a_fold_happens_once_across_evictions_and_restarts(refs, solo, start, folders, tmp_path):
    folds = tmp_path / "folds"
    tight = {"adapter_kv_share": 0.02, "kv_bytes": kv_bytes(150), "host_bytes": 1}
    load = mixed_load(refs, 39)
    soft = [digest for digest in folders if digest.rsplit("-", 1)[0] in SOFT]
    engine = start(folds_dir=str(folds), **tight)
    counts, on_step = count_folds(engine)
    check(run(engine, load, on_step), solo)
    engine.close()
    # How many there are depends on when loads finish: on a busy machine, one of each.
    assert engine.scheduler.slots.num_evictions >= len(soft)
    assert counts == dict.fromkeys(soft, 1)
    files = {path.name: path.stat().st_mtime_ns for path in folds.iterdir()}
    assert len(files) == len(soft)

    reader = Reader(folders)
    engine = start(reader, folds_dir=str(folds), **tight)
    counts, on_step = count_folds(engine)
    check(run(engine, load, on_step), solo)
    engine.close()
    assert not counts
    assert not set(reader.counts) & set(soft)
    assert {path.name: path.stat().st_mtime_ns for path in folds.iterdir()} == files


def test_a_fold_happens_once_while_host_memory_keeps_it(refs, solo, start):
    engine = start(adapter_kv_share=0.02, kv_bytes=kv_bytes(150))
    counts, on_step = count_folds(engine)
    for _ in range(2):
        check(run(engine, mixed_load(refs, 39), on_step), solo)
    assert engine.scheduler.slots.num_evictions > 12
    assert set(counts.values()) == {1}


def test_a_damaged_fold_is_folded_again(refs, solo, start, folders, tmp_path):
    folds = tmp_path / "folds"
    load = [one for one in mixed_load(refs, 39) if one.adapter in (refs["cpt-1"], refs["cpt-2"])]
    expected = {one.request_id: solo[one.request_id] for one in load}
    engine = start(folds_dir=str(folds))
    check(run(engine, load), expected)
    engine.close()
    first, second = sorted(folds.iterdir())
    first.write_bytes(first.read_bytes()[:-50])
    second.write_bytes(b"")
    reader = Reader(folders)
    engine = start(reader, folds_dir=str(folds))
    check(run(engine, load), expected)
    engine.close()
    assert reader.counts == {"cpt-1": 1, "cpt-2": 1}
    assert [path.stat().st_size > 0 for path in sorted(folds.iterdir())] == [True, True]


def test_a_fold_in_which_one_bit_changed_is_folded_again(refs, solo, start, folders, tmp_path):
    folds = tmp_path / "folds"
    load = [one for one in mixed_load(refs, 39) if one.adapter in (refs["cpt-1"], refs["cpt-2"])]
    expected = {one.request_id: solo[one.request_id] for one in load}
    engine = start(folds_dir=str(folds))
    check(run(engine, load), expected)
    engine.close()
    first, second = sorted(folds.iterdir())
    good = {path: path.read_bytes() for path in (first, second)}
    changed = bytearray(good[first])
    changed[-2] ^= 0x40  # an exponent's: a number of another size
    first.write_bytes(changed)
    # Whole, but another adapter's.
    second.write_bytes(good[first])
    reader = Reader(folders)
    engine = start(reader, folds_dir=str(folds))
    check(run(engine, load), expected)
    engine.close()
    assert reader.counts == {"cpt-1": 1, "cpt-2": 1}
    assert {path: path.read_bytes() for path in (first, second)} == good


def test_folds_that_cannot_be_written_cost_nothing_but_time(refs, solo, start, tmp_path):
    blocked = tmp_path / "folds"
    blocked.write_text("a file where a folder is wanted")
    check(run(start(folds_dir=str(blocked)), mixed_load(refs, 39)), solo)


def test_the_folded_form_is_that_of_one_forward(refs, start, folders):
    """Folded in chunks among other rows, it is what the base makes of the soft rows by itself."""
    model = tiny_model("llama")
    form = load_serving_form(folders["cpt-1"], tiny_spec(model), CheckpointLimits())
    assert isinstance(form, SoftPrompt)
    with torch.no_grad():
        cache = model(inputs_embeds=form.embeddings[None], use_cache=True).past_key_values
    engine = start(prefill_chunk=4)
    run(engine, mixed_load(refs, 39))
    folded = engine._host.get("cpt-1")
    assert isinstance(folded, KVPrefix)
    for layer in range(3):
        torch.testing.assert_close(folded.keys[layer], cache.layers[layer].keys[0])
        torch.testing.assert_close(folded.values[layer], cache.layers[layer].values[0])


# --- leaving, staying, nothing changed -------------------------------------------------------


def test_an_abort_frees_its_blocks_within_two_steps(refs, start):
    engine = start()
    for ref in refs.values():
        engine.preload(ref)
    run(engine, [])  # how long reading takes must not decide who runs
    for one in mixed_load(refs, 13):
        engine.submit(one)
    for _ in range(6):
        engine.step()
    running = [s.request.request_id for s in engine.scheduler.running if s.request is not None]
    assert len(running) > 5
    for one in mixed_load(refs, 13):
        engine.abort(one.request_id)
    engine.abort("never heard of")
    for _ in range(2):
        assert not [event for event in engine.step() if isinstance(event, TokenEvent)]
    engine.scheduler.check_integrity()
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    held = engine.scheduler.slots.num_adapter_blocks
    assert engine.stats().kv_blocks_used == held
    for one in mixed_load(refs, 13):
        if one.adapter is not None:
            engine.unload(one.adapter.digest)
    assert engine.stats().kv_blocks_used == 0


def test_preload_and_unload(refs, start):
    engine = start()
    for ref in refs.values():
        engine.preload(ref)
    told = {}
    for _ in range(500):
        if not engine.has_work:
            break
        for event in engine.step():
            assert isinstance(event, ResidencyEvent)
            told[event.digest] = event.residency
    assert told == dict.fromkeys(refs, "device")
    entries = engine.scheduler.slots.entries
    assert all(entries[digest].residency is Residency.DEVICE for digest in refs)
    engine.unload("cpt-1")
    engine.unload("cpt-1")
    assert ResidencyEvent("cpt-1", "host") in engine.step()
    engine.submit(request("r", prompt_ids(5), refs["ia3-1"], 5))
    engine.step()
    engine.unload("ia3-1")  # in use: stays
    assert entries["ia3-1"].residency is Residency.DEVICE
    run(engine, [])


def test_an_adapter_that_is_dropped_leaves_host_memory_too(refs, solo, start):
    engine = start()
    expected = run(engine, mixed_load(refs, 39))
    told = {}
    for digest in refs:
        engine.drop(digest)
        engine.drop(digest)
    for event in engine.residency_changes():
        told[event.digest] = event.residency
    assert told == dict.fromkeys(refs, "disk")
    assert engine._host._forms == {}
    assert engine._host._bytes == 0
    assert engine.stats().kv_blocks_used == 0
    assert run(engine, mixed_load(refs, 39)).keys() == expected.keys()  # and comes back
    engine.scheduler.check_integrity()


def test_an_adapter_that_is_dropped_while_it_runs_serves_who_uses_it(refs, start):
    engine = start()
    for ref in refs.values():
        one = request("r", prompt_ids(5), ref, 5)
        expected = tokens(run(engine, [one])["r"])
        engine.submit(one)
        events = engine.step()
        engine.drop(ref.digest)
        while engine.has_work:
            events += engine.step()
        assert tokens([e for e in events if not isinstance(e, ResidencyEvent)]) == expected
        engine.scheduler.check_integrity()


def test_a_row_of_the_scale_tables_is_clean_for_its_next_user(refs, start):
    """IA3 on all projections, then IA3 on two: what the first had set elsewhere is ones again."""
    engine = start(scale_slots=1)
    prompt = prompt_ids(11)
    first = run(engine, [request("a", prompt, refs["ia3-output-side-1"])])["a"]
    second = run(engine, [request("b", prompt, refs["ia3-1"])])["b"]
    again = run(engine, [request("a", prompt, refs["ia3-output-side-1"])])["a"]
    alone = run(start(scale_slots=1), [request("b", prompt, refs["ia3-1"])])["b"]
    assert tokens(second) == tokens(alone)
    assert tokens(again) == tokens(first)


def test_frozen_weights_are_the_same_bytes_after_a_mixed_load(refs, folders):
    model = tiny_model("llama")

    def digest():
        state = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            state.update(name.encode() + tensor.numpy().tobytes())
        return state.hexdigest()

    before = digest()
    engine = tiny_engine(model, folders)
    run(engine, mixed_load(refs, 39))
    engine.close()
    assert digest() == before


def test_too_long_is_refused_with_the_numbers(refs, start):
    engine = start(kv_bytes=kv_bytes(8))
    (event,) = engine.submit(request("r", prompt_ids(60), refs["cpt-1"], 10))
    assert isinstance(event, FailedEvent)
    assert event.code == "too_long"
    assert "9 virtual tokens" in event.message
    (event,) = start().submit(request("r", prompt_ids(500), None, 14))
    assert "make 514; the base has 512 positions" in event.message
    assert not engine.has_work
