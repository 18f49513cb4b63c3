"""The update rules of optimizers that torch lacks, against their formulas and against torch's own."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import tiny_recipe
from drumline.errors import PlanError
from drumline.recipe.load import validate
from drumline.train.objectives import ObjectiveModule
from drumline.train.optimizers import RATE_RATIO, build_optimizer
from drumline.train.updates.adamw_8bit import AdamW8bit, Codebook, values_of
from drumline.train.updates.lion import Lion
from drumline.train.updates.muon import Muon, orthogonalised


def steps(make: Any, weights: Tensor, count: int = 5) -> Tensor:
    """The weights after some steps on fixed gradients."""
    parameter = nn.Parameter(weights.clone())
    optimizer = make([{"params": [parameter], "weight_decay": 0.1}])
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        parameter.grad = torch.randn(weights.shape, generator=generator)
        optimizer.step()
    return parameter.detach()


def test_lion_is_its_formula() -> None:
    """Chen et al. 2023, algorithm 2, written out for one tensor."""
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    found = steps(lambda groups: Lion(groups, 0.01, (0.9, 0.99)), start)
    weights, average = start.clone(), torch.zeros_like(start)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        gradient = torch.randn(start.shape, generator=generator)
        direction = torch.sign(0.9 * average + 0.1 * gradient)
        weights = weights - 0.01 * (direction + 0.1 * weights)
        average = 0.99 * average + 0.01 * gradient
    assert (found - weights).abs().max() < 1e-6


def test_muon_is_torchs_up_to_the_precision_of_its_iteration() -> None:
    """torch iterates in bf16; ours in fp32 is nearer to the exact iteration in fp64."""
    start = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))

    def theirs(groups: Any) -> Any:
        return torch.optim.Muon(groups, lr=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")

    def ours(groups: Any) -> Any:
        for group in groups:
            group["is_matrix"] = True
        return Muon(groups, 0.01, 0.95, (0.9, 0.95), 1e-8)

    moved = steps(theirs, start) - start
    assert (steps(ours, start) - start - moved).norm() < 0.03 * moved.norm()


@given(rows=st.integers(2, 40), columns=st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_an_orthogonalised_matrix_has_singular_values_near_one(rows: int, columns: int) -> None:
    """Between 0.5 and 1.3, tall or wide, and each of a batch by itself."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    batch = torch.randn(3, rows, columns, generator=generator)
    found = orthogonalised(batch)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    if max(rows, columns) > 2 * min(rows, columns):  # else some are near zero to begin with
        assert values.min() > 0.5
    assert (found[1] - orthogonalised(batch[1])).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(64, 256), (70, 300), (3, 40, 96)])
def test_eight_bits_are_close_to_adamw(shape: tuple[int, ...]) -> None:
    """Five steps end within 2 % of the distance that torch's AdamW goes; vectors and small tensors exactly there."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def theirs(groups: Any) -> Any:
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))

    def ours(groups: Any) -> Any:
        return AdamW8bit(groups, 0.01, (0.9, 0.99), 1e-8)

    moved = steps(theirs, start) - start
    assert (steps(ours, start) - start - moved).norm() < 0.02 * moved.norm()
    for small in (start.flatten()[:500], start.flatten()[:400].view(20, 20)):
        assert (steps(ours, small) - steps(theirs, small)).abs().max() < 1e-6


@given(
    seed=st.integers(0, 99), columns=st.sampled_from([1, 255, 256, 257, 600]), signed=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_a_code_is_the_nearest_value(seed: int, columns: int, signed: bool) -> None:
    """Within half the widest step of its block's scale; zero and the largest are exact; part of the rows is that part."""
    generator = torch.Generator().manual_seed(seed)
    moment = torch.randn(4, columns, generator=generator) * 10.0 ** torch.randint(
        -6, 3, (4, 1), generator=generator
    )
    moment[2] = 0
    moment = moment if signed else moment.abs()
    blocks = -(-columns // 256)
    code = torch.zeros(4, columns, dtype=torch.uint8)
    scale = torch.zeros(4, blocks)
    book = Codebook(signed, torch.device("cpu"))
    assert (book.widened(code, scale) == 0).all()
    book.narrow(moment, code, scale)
    again = book.widened(code, scale)
    values = values_of(signed)
    widest = max(b - a for a, b in itertools.pairwise(values)) / 2
    whole = scale.repeat_interleave(256, dim=1)[:, :columns]
    edge = 1 - values[-1] if not signed else 1 + values[0]
    assert ((again - moment).abs() <= (widest + abs(edge) + 1e-6) * whole).all()
    assert (again[2] == 0).all()
    half, half_scale = torch.zeros(2, columns, dtype=torch.uint8), torch.zeros(2, blocks)
    book.narrow(moment[2:], half, half_scale)
    assert torch.equal(half, code[2:])
    assert torch.equal(half_scale, scale[2:])


class Layers(nn.Module):
    """Named like a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2, bias=False)


def groups_of(**changes: Any) -> dict[str, tuple[float, float]]:
    """Of every parameter its weight decay and the ratio of its rate."""
    module: Any = ObjectiveModule(Layers(), None)  # type: ignore[arg-type]
    recipe = validate(
        tiny_recipe(optimizer={"name": "adamw", "lr": 0.1, "weight_decay": 0.3, **changes}), "r"
    )
    built = build_optimizer(module, recipe)
    names = {id(p): name for name, p in module.model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group.get(RATE_RATIO, 1.0))
        for group in built.param_groups
        for p in group["params"]
    }


def test_groups_have_rates_and_decays_of_their_own() -> None:
    """The first that matches holds; what is not stated stays; every parameter is in one group."""
    plain = groups_of()
    assert plain["head.weight"] == (0.3, 1.0)
    assert plain["norm.weight"] == (0.0, 1.0)
    found = groups_of(groups=[{"match": "norm.*", "weight_decay": 0.1}, {"match": "embed.*", "lr_ratio": 0.5},
                              {"match": "*", "weight_decay": 0.0}])  # fmt: skip
    assert found["norm.bias"] == (0.1, 1.0)
    assert found["embed.weight"] == (0.3, 0.5)
    assert found["head.weight"] == (0.0, 1.0)
    assert found.keys() == plain.keys() == {n for n, _ in Layers().named_parameters()}
    with pytest.raises(
        PlanError, match=r"optimizer.groups.0.match: 'nrom.\*' matches no parameter. Nearest: norm"
    ):
        groups_of(groups=[{"match": "nrom.*"}])


def test_each_layer_has_a_part_of_the_rate_above_it() -> None:
    """The head the whole rate, the last of three layers 0.5 of it, the embeddings 0.5 to the fourth."""
    found = groups_of(layer_decay=0.5)
    assert [found[f"layers.{n}.weight"][1] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["head.weight"][1] == found["norm.weight"][1] == 1.0
    assert found["embed.weight"][1] == 0.0625
