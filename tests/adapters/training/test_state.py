"""Checkpoints of a run: whole or refused, one replaces the other, a full disk keeps the former."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from adapters.errors import TrainingError
from adapters.training.state import (
    STATE_FILE,
    RunState,
    load,
    optimizer_tensors,
    restore_optimizer,
    save,
)
from tests.full_disk import run_on_a_small_disk


def a_state(step=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 6, generator=generator)
    return RunState(
        step=step,
        parameters={"embedding.weight": rows, "mlp_head.0.bias": rows[0].clone()},
        optimizer={"0/exp_avg": rows * 2, "0/step": torch.tensor(3.0), "1/step": torch.tensor(3.0)},
        generator=torch.get_rng_state(),
        best={"embedding.weight": rows + 1},
        facts={"losses": [0.1, 1 / 3], "evaluations": [{"loss": 5e-324}], "text": "é\u2028"},
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
        for name, tensor in one.items()
    )


def assert_same(got, want):
    assert (got.step, got.facts) == (want.step, want.facts)
    assert torch.equal(got.generator, want.generator)
    for group in ("parameters", "optimizer", "best"):
        assert same(getattr(got, group), getattr(want, group)), group


def test_what_is_loaded_is_what_was_saved(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    save(folder, a_state())
    assert_same(load(folder), a_state())


def test_the_last_one_counts(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, a_state(step, seed=step))
    assert_same(load(tmp_path), a_state(3, seed=3))
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_without_one_there_is_none(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path / "nowhere") is None


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    (tmp_path / f".{STATE_FILE}").write_bytes(b"half of")
    assert load(tmp_path) is None
    save(tmp_path, a_state())
    assert_same(load(tmp_path), a_state())
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    state = a_state()
    state.parameters["view"] = torch.arange(12.0).view(3, 4).T[1:]
    save(tmp_path, state)
    assert torch.equal(load(tmp_path).parameters["view"], state.parameters["view"])


def test_any_changed_bit_and_any_missing_end_are_found(tmp_path):
    save(tmp_path, a_state())
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    draw = random.Random(0)
    damaged = [whole[:length] for length in (0, 1, 31, 32, 40, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0"]
    for _ in range(200):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(changed))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TrainingError, match="damaged"):
            load(tmp_path)
    path.write_bytes(whole)
    assert_same(load(tmp_path), a_state())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_restored_optimizer_takes_the_same_step(kind):
    def build():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        if kind == "sgd":
            return module, torch.optim.SGD(module.parameters(), lr=0.1)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()

    module, optimizer = build()
    for seed in (1, 2, 3):
        step(module, optimizer, seed)
    again, fresh = build()
    again.load_state_dict(module.state_dict())
    tensors = {name: t.clone() for name, t in optimizer_tensors(optimizer).items()}
    assert bool(tensors) == (kind == "adamw")
    restore_optimizer(fresh, tensors)
    for one in ((module, optimizer), (again, fresh)):
        step(*one, seed=4)
    assert same(dict(module.state_dict()), dict(again.state_dict()))
    assert same(optimizer_tensors(fresh), optimizer_tensors(optimizer))


# Saves until a small disk of its own is full; the checkpoint before must be the one that is found.
_ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    import torch
    from adapters.errors import StorageFull
    from adapters.training.state import STATE_FILE, RunState, load, save
    disk = Path(sys.argv[1])
    folder = disk / "state"
    def state(step, size):
        rows = {"w": torch.full((size,), float(step))}
        return RunState(step, rows, {}, torch.get_rng_state())
    save(folder, state(0, 20_000))
    kept, outcomes = 0, set()
    for step in range(1, 40):
        try:
            save(folder, state(step, 20_000 * (1 + step % 8)))
            kept = step
            outcomes.add("saved")
        except StorageFull as error:
            assert "checkpoint" in str(error)
            outcomes.add("full")
        assert [path.name for path in folder.iterdir()] == [STATE_FILE]
        found = load(folder)
        assert found.step == kept
        assert bool((found.parameters["w"] == kept).all())
    assert outcomes == {"saved", "full"}, outcomes
    print("held")
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    run_on_a_small_disk(_ON_A_FULL_DISK, tmp_path, "1m")
