"""Quantised frozen layers: their bytes, their products and gradients, and what is exported of them."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advice import heard
from drumline.errors import PlanError
from drumline.train.models.edits import choose_trained
from drumline.train.models.quantized import NF4, QuantizedLinear, packing, unpacked
from memory.plans import SMALL, small_plan


def filled(
    rows: int, columns: int, kind: str, bias: bool = True
) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(rows + columns)
    linear = nn.Linear(columns, rows, bias)
    layer = QuantizedLinear(linear, kind)
    layer._parameters["weight"] = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    layer.pack()
    return linear, layer


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    kind=st.sampled_from(["nf4", "int8"]),
    start=st.integers(0, 8),
)
@settings(max_examples=40, deadline=None)
def test_rows_have_the_bytes_of_the_whole(rows: int, blocks: int, kind: str, start: int) -> None:
    """Each weight is the nearest value of its block; part of the rows is that part of the bytes."""
    generator = torch.Generator().manual_seed(rows * 10 + blocks)
    weight = torch.randn(rows, 64 * blocks, generator=generator)
    weight[0, :64] = 0
    packed, scales = packing(kind, weight)
    wide = unpacked(kind, packed, scales)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 32 * blocks if kind == "nf4" else 64 * blocks)
    assert (wide[0, :64] == 0).all()
    if kind == "nf4":
        whole = scales.repeat_interleave(64, dim=1)
        values = torch.tensor(NF4)
        nearest = ((weight / whole.clamp_min(1e-30)).unsqueeze(-1) - values).abs().amin(-1) * whole
        assert torch.allclose((wide - weight).abs(), nearest, atol=1e-6)
    else:
        assert ((wide - weight).abs() <= scales / 254 + 1e-6).all()
    part = min(start, rows - 1)
    again = packing(kind, weight[part:])
    assert torch.equal(again[0], packed[part:])
    assert torch.equal(again[1], scales[part:])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_product_and_its_gradient_are_those_of_the_widened_weights(kind: str) -> None:
    """Under autocast in its dtype; no gradient for the weights; a bias is added."""
    _, layer = filled(48, 128, kind)
    x = torch.randn(5, 128, requires_grad=True)
    layer(x).square().sum().backward()
    wide, same = layer.widened(torch.float32), x.detach().clone().requires_grad_(True)
    (same @ wide.T + layer.bias).square().sum().backward()
    assert torch.allclose(x.grad, same.grad, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert [p.dtype for p in (layer.packed, layer.scales)] == [torch.uint8] * 2
    before = layer.widened(torch.float32)
    layer.unpack()
    assert torch.equal(layer.weight, before)


def test_a_layer_takes_four_and_a_half_bits_a_weight() -> None:
    """Codes and scales: 0.5625 bytes of nf4, a little more than one of int8."""
    for kind, most in (("nf4", 0.5626), ("int8", 1.01)):
        _, layer = filled(64, 1024, kind, bias=False)
        assert sum(p.numel() for p in layer.parameters()) / (64 * 1024) <= most


def test_what_is_quantised_is_every_linear_layer_of_the_blocks() -> None:
    """Not the embeddings, the head or the experts; a model without any such layer is refused."""
    for architecture, expected in (("llama", 7), ("mixtral", 4)):
        plan = small_plan(architecture, model={"adapter": {"rank": 4}, "quantization": "nf4"})
        config = transformers.AutoConfig.for_model(architecture, **SMALL[architecture])
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)
        choose_trained(model, plan.recipe, [])
        found = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        assert len([name for name in found if ".layers.0." in name]) == expected
        assert not [name for name in found if "head" in name]
    config = transformers.AutoConfig.for_model("gpt2", **SMALL["gpt2"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = small_plan("gpt2", model={"adapter": {"rank": 4}})
    quantised = plan.recipe.model.model_copy(update={"quantization": "nf4"})
    with pytest.raises(PlanError) as caught:
        choose_trained(model, plan.recipe.model_copy(update={"model": quantised}), [])
    heard("finds no linear layer in the model's blocks", str(caught.value))
    choose_trained(model, plan.recipe, [])
