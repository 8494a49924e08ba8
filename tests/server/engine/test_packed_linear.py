"""Packed layers against nn.Linear; and layers that are packed as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from server.engine.packed_linear import PackedLinear, can_pack, pack_linears

if not can_pack(nn.Linear(1, 1).bfloat16()):
    pytest.skip("packs need a processor that computes in bf16", allow_module_level=True)


class Attention(nn.Module):
    """Three layers that read one input, and one that does not."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 48, bias=bias)
        self.k_proj = nn.Linear(32, 16, bias=bias)
        self.v_proj = nn.Linear(32, 16, bias=bias)
        self.o_proj = nn.Linear(48, 32, bias=bias)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def pair(bias: bool = False) -> tuple[Attention, Attention]:
    """The same layers as they are, and packed."""
    torch.manual_seed(0)
    plain = Attention(bias).bfloat16()
    packed = Attention(bias).bfloat16()
    packed.load_state_dict(plain.state_dict())
    assert pack_linears(packed) == 4
    return plain, packed


def inputs(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 5, 32, generator=generator).bfloat16() for _ in range(count)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def _triple_in_place(_module, _args, out):
    out.mul_(3)


def same(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_one_product_are_the_layers_own(bias):
    plain, packed = pair(bias)
    for x in inputs():
        same(packed(x), plain(x))
        same([packed.o_proj(packed.q_proj(x))], [plain.o_proj(plain.q_proj(x))])


def test_any_order_and_any_input():
    plain, packed = pair()
    a, b = inputs()
    asked = [
        ("k_proj", a), ("q_proj", a), ("k_proj", a), ("v_proj", b), ("v_proj", a),
        ("q_proj", b), ("q_proj", b), ("k_proj", b), ("v_proj", b), ("v_proj", b),
    ]  # fmt: skip
    for name, x in asked:
        same([getattr(packed, name)(x)], [getattr(plain, name)(x)])


def test_hooks_of_one_layer_touch_no_other():
    plain, packed = pair()
    for module in (plain, packed):
        module.k_proj.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
        module.v_proj.register_forward_hook(_triple_in_place)
    for x in inputs():
        same(packed(x), plain(x))
        same(packed(x), plain(x))


def test_what_was_taken_is_not_kept():
    _, packed = pair()
    (x,) = inputs(1)
    packed(x)
    pack = packed.q_proj.pack
    assert pack is packed.v_proj.pack
    assert pack is not packed.o_proj.pack
    assert pack._input is None
    assert not pack._ready


def test_no_rows():
    _, packed = pair()
    assert [out.shape for out in packed(torch.empty(1, 0, 32).bfloat16())] == [
        (1, 0, 48), (1, 0, 16), (1, 0, 16)
    ]  # fmt: skip


def test_layers_of_unequal_kind_are_packed_apart():
    module = Attention(bias=False)
    module.k_proj = nn.Linear(32, 16, bias=True)
    module = module.bfloat16()
    assert pack_linears(module) == 4
    packs = {id(getattr(module, name).pack) for name in ("q_proj", "k_proj", "v_proj")}
    assert len(packs) == 3
    assert type(module.k_proj) is PackedLinear
