"""The numbers of the operator's guide are those of the code."""

from __future__ import annotations

import re

import torch

from server.base.load import describe_base
from server.config.settings import MIB, Settings
from server.engine.blocks import blocks_for
from server.engine.config import EngineConfig
from server.engine.kv_cache import KVBlocks
from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.docker.files import DOCKERFILE, GUIDE, alert_names, services

TEXT = " ".join(" ".join(page.read_text() for page in GUIDE).split())
BLOCK = EngineConfig("", "").block_size


def one(pattern):
    """The number in the one place of the guide that fits."""
    found = re.findall(pattern, TEXT)
    assert len(found) == 1, pattern
    return float(found[0].replace(",", ""))


@needs_base
def test_memory_of_the_default_base():
    spec = describe_base(BASE_DIR, dtype="bfloat16")
    a_block = KVBlocks.bytes_per_block(spec, BLOCK, torch.bfloat16)
    a_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
    assert a_block == BLOCK * a_token
    assert one(r"a token\. \| ([\d,]+) bytes") == a_token

    kv_mib = Settings.model_fields["kv_mib"].default
    tokens = kv_mib * MIB // a_block * BLOCK
    assert one(r"1024 MiB are ([\d,]+) tokens") == tokens
    running = Settings.model_fields["max_running"].default
    assert one(r"64 sequences have room for (\d+) tokens") == tokens // running

    assert one(r"32 tokens: (\d+) KiB") == blocks_for(32, BLOCK) * a_block / 1024
    files = sum(path.stat().st_size for path in BASE_DIR.glob("*.safetensors"))
    assert one(r"read them again\. .*? \| (\d+) MiB \| \| packed") == round(files / MIB)


@needs_base
def test_memory_of_ia3():
    modules = describe_base(BASE_DIR, dtype="bfloat16").linear_modules
    widths = [m.out_features for path, m in modules.items() if path.endswith(("k_proj", "v_proj"))]
    widths += [m.in_features for path, m in modules.items() if path.endswith("down_proj")]
    a_row = 4 * sum(widths)
    slots = Settings.model_fields["scale_slots"].default
    assert one(r"MLP: (\d+) KiB") == a_row / 1024
    assert one(r"KiB, (\d+) rows") == slots + 1
    assert one(r"rows ([\d.]+) MiB") == round(a_row * (slots + 1) / MIB, 1)


def test_the_sum_fits_the_limit_of_the_server_in_compose():
    parts = {name: Settings.model_fields[f"{name}_mib"].default for name in ("kv", "host")}
    total = (1024 + 2 * 257 + sum(parts.values())) / 1024
    assert one(r"takes up to ([\d.]+) GiB") >= total
    assert services()["server"]["mem_limit"] == "6g"


def test_every_alert_is_explained():
    explained = re.findall(r"\| `(Graftwork\w+)` \|", TEXT)
    assert sorted(explained) == sorted(alert_names())


def test_every_build_argument_is_explained():
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.MULTILINE))
    assert arguments == set(re.findall(r"`([A-Z_]+)`", TEXT.split("## Compose")[0])) & arguments
