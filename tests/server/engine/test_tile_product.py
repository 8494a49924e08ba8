"""Products on the processor's tiles against oneDNN's, whose weights they read."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from server.engine.packed_linear import PackedLinear, can_pack, pack_linears
from server.engine.tile_product import PRODUCT_ROWS, TileProduct
from server.engine.tiles import MOST_ROWS, has_tiles

if not (has_tiles() and can_pack(nn.Linear(1, 1).bfloat16())):
    pytest.skip("the processor has no tiles, or may not use them", allow_module_level=True)

SHAPES = [(32, 32), (960, 576), (576, 1536), (96, 96), (64, 2048)]


def packed(columns: int, inputs: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, inputs, generator=generator).bfloat16()
    return weight, torch.ops.mkldnn._reorder_linear_weight(weight, 32)


def by_onednn(x, pack, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, pack, bias, "none", [], "")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"], autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("columns", "inputs"), SHAPES)
def test_the_same_to_the_last_bit(columns, inputs, with_bias):
    weight, pack = packed(columns, inputs)
    bias = torch.linspace(-2, 2, columns).bfloat16() if with_bias else None
    product = TileProduct.of(pack, weight, bias)
    assert product is not None
    generator = torch.Generator().manual_seed(1)
    for rows in range(1, MOST_ROWS + 1):
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        assert torch.equal(product(x), by_onednn(x, pack, bias)), rows


def test_a_row_does_not_depend_on_the_others():
    weight, pack = packed(96, 160)
    product = TileProduct.of(pack, weight, None)
    x = torch.randn(PRODUCT_ROWS, 160).bfloat16()
    alone = torch.cat([product(x[i : i + 1]) for i in range(PRODUCT_ROWS)])
    for rows in (2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 95, PRODUCT_ROWS - 1, PRODUCT_ROWS):
        assert torch.equal(product(x[:rows]), alone[:rows])


def test_nothing_beyond_the_rows_is_read_or_written():
    """Rows of a wider tensor, the last of them at its end; NaN everywhere else."""
    weight, pack = packed(64, 64)
    product = TileProduct.of(pack, weight, None)
    for rows in (1, 7, 16, 23, 32, 33, 50, 64, 100):
        wide = torch.full((rows, 160), float("nan")).bfloat16()
        wide[:, 96:] = torch.randn(rows, 64).bfloat16()
        x = wide[:, 96:]
        assert torch.equal(product(x), product(x.contiguous()))


def test_numbers_that_are_none_stay_in_their_row():
    weight, pack = packed(64, 64)
    product = TileProduct.of(pack, weight, None)
    x = torch.randn(20, 64).bfloat16()
    expected = product(x)
    x[3, 5] = float("nan")
    x[18, 0] = float("inf")
    got = product(x)
    assert torch.isnan(got[3]).all()
    others = [i for i in range(20) if i not in (3, 18)]
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize(("columns", "inputs"), [(48, 64), (64, 48), (80, 32), (1, 32)])
def test_other_sizes_are_left_to_onednn(columns, inputs):
    assert TileProduct.of(packed(columns, inputs)[1], packed(columns, inputs)[0], None) is None


def test_another_layout_is_found():
    weight, pack = packed(64, 64)
    other, _ = packed(64, 64, seed=1)
    assert TileProduct.of(pack, weight, None) is not None
    assert TileProduct.of(pack, other, None) is None
    swapped = torch.cat((weight[32:], weight[:32]))
    assert TileProduct.of(pack, swapped, None) is None


def test_a_packed_layer_uses_them_and_takes_any_shape(monkeypatch):
    layer = nn.Sequential(nn.Linear(64, 96)).bfloat16()
    plain = layer[0]
    assert pack_linears(layer) == 1
    assert type(layer[0]) is PackedLinear
    calls = []
    real = TileProduct.__call__
    monkeypatch.setattr(
        TileProduct, "__call__", lambda self, x: calls.append(len(x)) or real(self, x)
    )
    for shape in ((5, 64), (1, 5, 64), (2, 3, 64), (64,)):
        x = torch.randn(shape).bfloat16()
        torch.testing.assert_close(layer(x), plain(x), rtol=0.01, atol=0.01)
        assert layer(x).shape == plain(x).shape
    many = torch.randn(PRODUCT_ROWS + 1, 64).bfloat16()
    torch.testing.assert_close(layer(many), plain(many), rtol=0.01, atol=0.01)
    assert calls == [5, 5, 5, 5, 6, 6, 1, 1]


def test_without_the_permission_onednn_computes():
    """A process in which Linux refuses; asked in one of its own, since an answer holds for good."""
    code = (
        "import ctypes\n"
        "class Refuses:\n"
        "    def __init__(self, _): pass\n"
        "    def syscall(self, *_): return -1\n"
        "import server.engine.tile_product as t\n"
        "t.ctypes.CDLL = Refuses\n"
        "assert not t.has_tiles()\n"
        "import torch\n"
        "w = torch.zeros(32, 32).bfloat16()\n"
        "p = torch.ops.mkldnn._reorder_linear_weight(w, 32)\n"
        "assert t.TileProduct.of(p, w, None) is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
