"""The layer kernels against the modules of transformers that they stand in for."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from server.engine.layer_kernels import fits, rms_norm, rotate, scale_rows, silu_times

DTYPES = [torch.float32, torch.bfloat16]
# What one more or one less in the last place of a sum or of exp makes of the result.
NEAR = {torch.float32: {"rtol": 1e-6, "atol": 1e-7}, torch.bfloat16: {"rtol": 0.008, "atol": 1e-6}}


def normal(*shape: int, dtype: torch.dtype, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 7, 16, 576, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_that_of_transformers(dtype, width, threads, torch_threads):
    torch_threads(threads)
    theirs = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    theirs.weight.data = normal(width, dtype=dtype, seed=1)
    for rows in (1, 3, 40, 300):
        x = normal(2, rows, width, dtype=dtype, spread=5.0)
        got, expected = rms_norm(x, theirs.weight, 1e-5), theirs(x).detach()
        # Rounded twice: what is one off before the weight may be two off after it, in very few places.
        far = {**NEAR[dtype], "rtol": 2 * NEAR[dtype]["rtol"]}
        torch.testing.assert_close(got, expected, **far)
        close = torch.isclose(got, expected, **NEAR[dtype])
        assert (~close).sum() <= 1e-5 * close.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_numbers_are_held_up_by_eps(dtype):
    x = torch.full((2, 64), 1e-6, dtype=dtype)
    weight = torch.ones(64, dtype=dtype)
    expected = x.float() / math.sqrt(1e-12 + 1e-3)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected.to(dtype), **NEAR[dtype])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [16, 96, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_silu_is_that_of_torch(dtype, width, threads, torch_threads):
    torch_threads(threads)
    for rows in (1, 5, 64):
        # Two halves of one product, as a packed pair of layers gives them.
        both = normal(1, rows, 2 * width, dtype=dtype, spread=6.0)
        gate, up = both.split(width, dim=-1)
        expected = functional.silu(gate) * up
        torch.testing.assert_close(silu_times(gate, up), expected, **NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_silu_far_out(dtype):
    gate = torch.tensor([[-1e4, -200.0, -88.0, -40.0, -0.0, 0.0, 40.0, 3e38] * 2], dtype=dtype)
    up = torch.full_like(gate, 0.5)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(silu_times(gate, up), expected, rtol=0.008, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_that_of_transformers_to_the_bit(dtype):
    for rows, heads, width in ((1, 1, 2), (3, 4, 16), (40, 9, 64), (300, 3, 80)):
        query = normal(1, rows, heads, width, dtype=dtype)
        cos, sin = normal(2, 1, rows, width, dtype=dtype, seed=2)
        expected, _ = apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=2)
        # A part of a larger row, as a packed product leaves it.
        wide = torch.zeros(rows, heads * width + 5, dtype=dtype)
        wide[:, 3:-2] = query.view(rows, -1)
        rotate(wide[:, 3:-2].view(rows, heads, width), cos[0], sin[0])
        assert torch.equal(wide[:, 3:-2].reshape(query.shape), expected)
        assert not wide[:, :3].any()
        assert not wide[:, -2:].any()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_scaled_by_their_own_slot(dtype, in_place):
    wide = normal(1, 9, 3 * 40, dtype=dtype)
    before, x = wide.clone(), wide[..., 40:80]
    scales = normal(4, 40, dtype=torch.float32, seed=3)
    slots = torch.tensor([0, 2, 2, 0, 3, 1, 0, 0, 3])
    factors = torch.where(slots[:, None] > 0, scales[slots], torch.ones(()))
    expected = (x.float() * factors).to(dtype)
    got = scale_rows(x, scales, slots, in_place=in_place)
    assert torch.equal(got, expected)
    assert got.is_contiguous() != in_place
    assert torch.equal(wide[..., 40:80], expected if in_place else before[..., 40:80])
    assert torch.equal(wide[..., :40], before[..., :40])
    assert torch.equal(wide[..., 80:], before[..., 80:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so_and_in_its_row(dtype, bad):
    x = normal(4, 32, dtype=dtype)
    weight = torch.ones(32, dtype=dtype)
    spoilt = x.clone()
    spoilt[2, 5] = bad
    others = [0, 1, 3]
    got = rms_norm(spoilt, weight, 1e-5)
    assert torch.isnan(got[2]).any()
    assert torch.equal(got[others], rms_norm(x, weight, 1e-5)[others])
    for gate, up in ((spoilt, x), (x, spoilt)):
        got = silu_times(gate, up)
        assert torch.equal(got[others], silu_times(x, x)[others])
        # silu(-inf) is 0 * -inf.
        assert not torch.isfinite(got[2, 5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype, torch_threads):
    x, weight = normal(700, 96, dtype=dtype), normal(96, dtype=dtype, seed=1)
    alone = [rms_norm(row[None], weight, 1e-5) for row in x]
    gated = [silu_times(row[None], row[None]) for row in x]
    for threads in (1, 2, 5):
        torch_threads(threads)
        assert torch.equal(rms_norm(x, weight, 1e-5), torch.cat(alone))
        assert torch.equal(silu_times(x, x), torch.cat(gated))


def test_what_they_serve():
    assert fits(torch.device("cpu"), torch.float32)
    assert fits(torch.device("cpu"), torch.bfloat16)
    assert not fits(torch.device("cpu"), torch.float16)
    assert not fits(torch.device("cuda"), torch.bfloat16)


def test_processors_with_narrower_registers(tmp_path):
    """The same tests of the kernels where LLVM is told of no AVX512."""
    code = (
        "import sys, llvmlite.binding as binding\n"
        "full = binding.get_host_cpu_features()\n"
        "narrow = binding.FeatureMap({name: on and 'avx512' not in name "
        "for name, on in full.items()})\n"
        "binding.get_host_cpu_features = lambda: narrow\n"
        "from server.engine.vector_ops import LANES\n"
        "assert LANES == 8\n"
        "import pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-k', "
        "'not narrower', 'tests/server/engine/test_layer_kernels.py', "
        "'tests/server/engine/test_decode_kernel.py']))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
