"""Sound checkpoints pass, hostile ones are refused with their words, writes are all or nothing."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import IA3Config, PeftModel, PromptEncoderConfig, get_peft_model

from adapters import errors
from adapters.base_model import describe
from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    TENSORS_FILE,
    check_checkpoint,
    check_file_set,
    checkpoint_digest,
    digest_of,
    load_serving_form,
    load_tensors,
    read_config,
    read_header,
    write_checkpoint,
)
from adapters.checkpoint.limits import CheckpointLimits
from adapters.method import TensorInfo
from adapters.parts import ActivationScales, SoftPrompt
from tests.adapters import checkpoints
from tests.adapters.checkpoint.hostile import headers
from tests.adapters.checkpoints import BASE
from tests.tiny_models import tiny_model


def _tensors_file(directory: Path, data: bytes) -> Path:
    path = directory / TENSORS_FILE
    path.write_bytes(data)
    return path


# --- header ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", headers.ATTACKS)
def test_a_forged_header_is_refused(attack: str, tmp_path: Path) -> None:
    data, error, words = headers.ATTACKS[attack]
    with pytest.raises(error) as caught:
        read_header(_tensors_file(tmp_path, data))
    assert type(caught.value) is error
    assert words in caught.value.message
    assert len(caught.value.message) < 700


@pytest.mark.parametrize("attack", headers.ATTACKS)
def test_a_refusal_takes_no_time_and_no_memory(attack: str, tmp_path: Path) -> None:
    path = _tensors_file(tmp_path, headers.ATTACKS[attack][0])
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors.CheckpointError):
        read_header(path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "double": torch.zeros(2, 3, dtype=torch.float64),
        "single": torch.zeros(5),
        "half": torch.zeros(1, 7, dtype=torch.float16),
        "brain": torch.zeros(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / TENSORS_FILE
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert read_header(path) == {
        "double": TensorInfo("F64", (2, 3)),
        "single": TensorInfo("F32", (5,)),
        "half": TensorInfo("F16", (1, 7)),
        "brain": TensorInfo("BF16", (3,)),
        "scalar": TensorInfo("F32", ()),
        "empty": TensorInfo("F32", (0, 4)),
    }
    loaded = load_tensors(path, tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_no_tensors_at_all_is_a_valid_file(tmp_path: Path) -> None:
    assert read_header(_tensors_file(tmp_path, headers.with_header(b"{}", b""))) == {}


def test_the_limits_are_the_callers(tmp_path: Path) -> None:
    path = _tensors_file(tmp_path, headers.good())
    with pytest.raises(errors.CheckpointTooLarge, match="at most 50 are accepted"):
        read_header(path, CheckpointLimits(file_bytes=50))
    with pytest.raises(errors.CheckpointTooLarge, match="at most 10 are accepted"):
        read_header(path, CheckpointLimits(header_bytes=10))
    crowded = _tensors_file(tmp_path, headers.many_tensors(30_000))
    with pytest.raises(errors.CheckpointTooLarge, match="30000 tensors"):
        read_header(crowded, CheckpointLimits(header_bytes=10**9))


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    real = _tensors_file(tmp_path, headers.good())
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe)
    for path in (link, pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(errors.UnsupportedFile, match="not a plain file"):
            read_header(path)


# --- config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", headers.CONFIG_ATTACKS)
def test_a_hostile_config_is_refused(attack: str, tmp_path: Path) -> None:
    data, words = headers.CONFIG_ATTACKS[attack]
    path = tmp_path / CONFIG_FILE
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(errors.ConfigInvalid) as caught:
        read_config(path)
    assert words in caught.value.message
    assert time.process_time() - start < 2


def test_a_config_over_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_text('{"a": "' + "x" * 2_000_000 + '"}')
    with pytest.raises(errors.CheckpointTooLarge):
        read_config(path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """Notepad and PowerShell put one before the text; PEFT cannot read it, so a download has none."""
    marked = checkpoints.soft_prompt(tmp_path / "marked")
    plain = (marked / CONFIG_FILE).read_bytes()
    (marked / CONFIG_FILE).write_bytes(b"\xef\xbb\xbf" + plain)
    assert read_config(marked / CONFIG_FILE) == json.loads(plain)
    (tmp_path / "staged").mkdir()
    stage_upload([(file.name, file) for file in marked.iterdir()], tmp_path / "staged")
    assert (tmp_path / "staged" / CONFIG_FILE).read_bytes() == plain
    assert digest_of(tmp_path / "staged") == digest_of(marked)


def test_a_config_keeps_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_text('{"a": [1, 2.5, -3, "\\u00e9\\ud83d\\ude00[{"], "b": {"c": null, "d": true}}')
    assert read_config(path) == {"a": [1, 2.5, -3, "é😀[{"], "b": {"c": None, "d": True}}


# --- whole checkpoints ----------------------------------------------------------------------


def test_a_sound_checkpoint_is_described(tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    checked = check_checkpoint(directory, BASE)
    assert (checked.method, checked.peft_type) == ("p_tuning", "P_TUNING")
    assert checked.facts.num_virtual_tokens == checkpoints.NUM_ROWS
    assert checked.base_name == "somebody/base"
    assert checked.digest == digest_of(directory)
    assert checked.num_bytes == sum(file.stat().st_size for file in directory.iterdir())


def test_the_serving_form_comes_back(tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    form = load_serving_form(directory, BASE, digest=digest_of(directory))
    assert isinstance(form, SoftPrompt)
    assert torch.equal(form.embeddings, checkpoints.rows()["prompt_embeddings"])
    ia3 = checkpoints.ia3(tmp_path / "b", ["k_proj", "v_proj"])
    scales = load_serving_form(ia3, BASE)
    assert isinstance(scales, ActivationScales)
    assert len(scales.outputs) == 4


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "config"])
def test_a_damaged_store_is_corrupt_for_the_loader(damage: str, tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    digest, path = digest_of(directory), directory / TENSORS_FILE
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        (directory / CONFIG_FILE).write_text("{")
    with pytest.raises(errors.AdapterCorrupt):
        load_serving_form(directory, BASE, digest=digest)
    if damage != "flipped":  # only the hash sees that
        with pytest.raises(errors.AdapterCorrupt):
            load_serving_form(directory, BASE)


def test_a_checkpoint_of_another_base_is_no_damage(tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    wider = BASE.from_dict({**BASE.to_dict(), "hidden_size": 16})
    with pytest.raises(errors.TensorMismatch):
        load_serving_form(directory, wider, digest=digest_of(directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_must_be_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    rows = checkpoints.rows()["prompt_embeddings"].to(dtype)
    rows[1, 5] = value
    write_checkpoint(tmp_path / "a", checkpoints.soft_prompt_config(), {"prompt_embeddings": rows})
    with pytest.raises(errors.NonFinite) as caught:
        check_checkpoint(tmp_path / "a", BASE)
    assert caught.value.field == "prompt_embeddings"
    with pytest.raises(errors.NonFinite):
        load_tensors(tmp_path / "a" / TENSORS_FILE, ["prompt_embeddings"])


@pytest.mark.parametrize(("dtype", "value"), [("float32", 1e300), ("float16", 1e5)])
def test_values_must_stay_finite_in_the_served_dtype(
    dtype: str, value: float, tmp_path: Path
) -> None:
    rows = checkpoints.rows()["prompt_embeddings"].double()
    rows[0, 0] = value
    write_checkpoint(tmp_path / "a", checkpoints.soft_prompt_config(), {"prompt_embeddings": rows})
    base = BASE.from_dict({**BASE.to_dict(), "dtype": dtype})
    with pytest.raises(errors.NonFinite):
        check_checkpoint(tmp_path / "a", base)


def test_shapes_are_refused_before_values_are_read(tmp_path: Path) -> None:
    rows = torch.full((3, 9), float("nan"))
    write_checkpoint(tmp_path / "a", checkpoints.soft_prompt_config(), {"prompt_embeddings": rows})
    with pytest.raises(errors.TensorMismatch):
        check_checkpoint(tmp_path / "a", BASE)


def test_the_file_set_is_exact(tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    (directory / "README.md").write_text("extra")
    with pytest.raises(errors.FileSetInvalid, match=r"came: README\.md"):
        check_checkpoint(directory, BASE)
    (directory / "README.md").unlink()
    (directory / TENSORS_FILE).unlink()
    with pytest.raises(errors.FileSetInvalid, match="expected adapter_config"):
        check_checkpoint(directory, BASE)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "pytorch_adapter.bin"], "AdapterHub's"),
        (["adapter_config.json", "adapters.safetensors"], "MLX's"),
        (["config.json", "pytorch_model.bin"], "ChatGLM's P-Tuning v2"),
        (["adapter_config.json", "model.safetensors"], "a whole model's"),
        (["adapter_config.json", "adapter_model-00001-of-00002.safetensors"], "in one file"),
        (["adapter_config.json", "lora.gguf"], "llama.cpp's"),
        (["adapter_config.json", "README.md"], "came: README.md, adapter_config.json"),
    ],
)
def test_files_of_another_program_are_named(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(errors.FileSetInvalid) as caught:
        check_file_set(tmp_path)
    assert words in caught.value.message


def test_a_bin_file_is_refused_with_a_line_that_converts_it(tmp_path: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    (directory / TENSORS_FILE).unlink()
    torch.save(checkpoints.rows(), directory / "adapter_model.bin")
    torch.save({}, directory / "optimizer.pt")
    with pytest.raises(errors.UnsupportedFile) as caught:
        check_checkpoint(directory, BASE)
    line = caught.value.message.partition("convert it first: ")[2]
    command = [sys.executable if word == "python" else word for word in shlex.split(line)]
    subprocess.run(command, cwd=directory, check=True)
    for name in ("adapter_model.bin", "optimizer.pt"):
        (directory / name).unlink()
    assert check_checkpoint(directory, BASE).peft_type == "P_TUNING"


# --- digest ---------------------------------------------------------------------------------


def test_the_digest_does_not_see_the_order_of_keys_sets_or_tensors(tmp_path: Path) -> None:
    one = checkpoints.ia3(tmp_path / "a", ["k_proj", "v_proj"])
    raw = json.loads((one / CONFIG_FILE).read_text())
    raw["target_modules"].reverse()
    turned = dict(reversed(raw.items()))
    tensors = safetensors.torch.load_file(one / TENSORS_FILE)
    shuffled = tmp_path / "shuffled"
    data, at = b"", 0
    header = {"__metadata__": {"made": "elsewhere"}}
    for name in sorted(tensors, reverse=True):
        block = tensors[name].numpy().tobytes()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(block)]}
        data, at = data + block, at + len(block)
    shuffled.write_bytes(headers.with_header(json.dumps(header).encode(), data))
    assert checkpoint_digest(turned, shuffled) == digest_of(one)


def test_the_digest_sees_everything_else(tmp_path: Path) -> None:
    digests = {
        digest_of(checkpoints.soft_prompt(tmp_path / "a")),
        digest_of(checkpoints.soft_prompt(tmp_path / "b", seed=1)),
        digest_of(checkpoints.soft_prompt(tmp_path / "c", base_model_name_or_path="other")),
        digest_of(checkpoints.soft_prompt(tmp_path / "d", peft_version="0.1")),
    }
    config = checkpoints.soft_prompt_config()
    rows = checkpoints.rows()["prompt_embeddings"]
    for name, tensors in {
        "e": {"other": rows},
        "f": {"prompt_embeddings": rows.reshape(8, 3)},
        "g": {"prompt_embeddings": rows.view(torch.bfloat16)},
    }.items():
        write_checkpoint(tmp_path / name, config, tensors)
        digests.add(digest_of(tmp_path / name))
    assert len(digests) == 7


# --- writing --------------------------------------------------------------------------------


def test_files_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    checkpoints.ia3(tmp_path / "a", ["v_proj", "k_proj"])
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    raw = json.loads(text)
    assert text == json.dumps(raw, indent=2, sort_keys=True)
    assert raw["target_modules"] == ["k_proj", "v_proj"]
    with safetensors.safe_open(tmp_path / "a" / TENSORS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_checkpoint(tmp_path / "a", {"x": float("nan")}, checkpoints.rows())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(FileExistsError):
        checkpoints.soft_prompt(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_views_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    rows = torch.arange(24.0).reshape(8, 3).T
    write_checkpoint(tmp_path / "a", {}, {"x": rows, "y": rows[1]})
    loaded = load_tensors(tmp_path / "a" / TENSORS_FILE, ["x", "y"])
    assert torch.equal(loaded["x"], rows)
    assert torch.equal(loaded["y"], rows[1])
    with (tmp_path / "a" / TENSORS_FILE).open("r+b") as file:
        file.truncate(10)
    assert torch.equal(loaded["x"], rows)  # memory of its own, not the file's mapping


# --- PEFT -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # PEFT asks for an old name
@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        IA3Config(task_type="CAUSAL_LM"),
    ],
    ids=["p_tuning", "ia3"],
)
def test_what_peft_saves_passes_and_what_we_save_peft_loads(config, tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = describe(model, digest="a" * 64, dtype="float32")
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    (tmp_path / "peft" / "README.md").unlink()
    checked = check_checkpoint(tmp_path / "peft", base)
    raw = read_config(tmp_path / "peft" / CONFIG_FILE)
    names = read_header(tmp_path / "peft" / TENSORS_FILE)
    write_checkpoint(tmp_path / "ours", raw, load_tensors(tmp_path / "peft" / TENSORS_FILE, names))
    assert digest_of(tmp_path / "ours") == checked.digest
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "README.md").unlink()
    again = load_tensors(tmp_path / "again" / TENSORS_FILE, names)
    ours = load_tensors(tmp_path / "ours" / TENSORS_FILE, names)
    assert all(torch.equal(again[name], ours[name]) for name in names)
