"""The kinds of GPU that a recipe may name, read from gpus.yaml, or state by hand."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from drumline.errors import PlanError
from drumline.recipe import yaml12
from drumline.recipe.schema import Card, Recipe
from drumline.units import GIB, format_bytes

_CUBLAS_HANDLES = 2
"""cuBLAS' handles, each with a workspace: the forward's thread has one, autograd's thread another."""

PUBLISHED_CONTEXT_BYTES = 500e6
"""The CUDA context of a card where it was not measured; 300 to 700 MB were published."""


@dataclass(frozen=True)
class Gpu:
    """One kind of device; memory in bytes, None for cpu, where it is that of the machine.

    `workspace_bytes`: of all of cuBLAS' handles. `bf16_flops` and `fp16_flops`: peak of its matrix units,
    None if it has none for this type. `bandwidth`: of its memory, `link`: to another GPU of the node, one
    way, both in bytes per second; `watts`: of the board.
    """

    name: str
    memory_bytes: int | None
    bf16_flops: float | None
    workspace_bytes: int
    has_flash: bool = True
    fp16_flops: float | None = None
    context_bytes: float = PUBLISHED_CONTEXT_BYTES
    bandwidth: float | None = None
    link: float | None = None
    watts: float | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether training runs on the CPU."""
        return self.name == "cpu"

    @property
    def narrow_flops(self) -> float | None:
        """Peak FLOP/s in the 16-bit type that its matrix units have."""
        return self.bf16_flops or self.fp16_flops


def find_gpu(gpu: str | Card) -> Gpu:
    """The device of this name, or as stated by hand; PlanError with the nearest names if there is none."""
    return _stated(gpu) if isinstance(gpu, Card) else _in_the_table(gpu)


def gpu_names() -> list[str]:
    """The names of all rows of the table."""
    return list(_rows())


@cache
def _rows() -> dict[str, Any]:
    return yaml12.parse((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@cache
def _in_the_table(name: str) -> Gpu:
    rows = _rows()
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    plain = wanted.replace("-", "")
    found = next(
        (
            n
            for n, row in rows.items()
            if plain in {one.replace("-", "") for one in (n, *row.get("also", []))}
        ),
        None,
    )
    if found is None:
        raise PlanError(f"cluster.gpu: {name!r} is not in the table. {_fix(wanted, rows)}")
    row = rows[found]
    memory, flops = row["memory_gib"], [row.get(f"{kind}_tflops") for kind in ("bf16", "fp16")]
    bf16, fp16 = (None if value is None else value * 1e12 for value in flops)
    size = None if memory is None else int(memory * GIB)
    measured = row.get("context_mib")
    return Gpu(
        found,
        size,
        bf16,
        _CUBLAS_HANDLES * row["workspace_mib"] << 20,
        row.get("flash", True),
        fp16,
        measured << 20 if measured else PUBLISHED_CONTEXT_BYTES,
        _billions(row.get("bandwidth_gbs")),
        _billions(row.get("link_gbs")),
        row.get("watts"),
    )


def _billions(value: float | None) -> float | None:
    return None if value is None else value * 1e9


def _fix(wanted: str, rows: dict[str, Any]) -> str:
    """The names that may be meant, or how to state a card by hand."""
    by_hand = (
        "cluster.gpu={name: my-card, memory_gib: 48, bf16_tflops: 155} states one that it lacks"
    )
    longer = [known for known in rows if known.startswith(wanted)]
    if not longer:
        from difflib import get_close_matches

        longer = get_close_matches(wanted, rows, n=1, cutoff=0.6)
    if longer:
        return f"Did you mean {' or '.join(map(repr, longer))}? {by_hand}"
    return f"Known: {', '.join(rows)}. {by_hand}"


_WORKSPACE = _CUBLAS_HANDLES * 32 << 20
"""cuBLAS' workspaces of a card that is stated by hand: the largest of the table's."""


def _stated(card: Card) -> Gpu:
    flops = None if card.bf16_tflops is None else card.bf16_tflops * 1e12
    return Gpu(card.name, int(card.memory_gib * GIB), flops, _WORKSPACE)


def with_own_name(recipe: Recipe, gpu: Gpu) -> Recipe:
    """The recipe with the GPU's own name in place of another common one."""
    if isinstance(recipe.cluster.gpu, Card) or recipe.cluster.gpu == gpu.name:
        return recipe
    cluster = recipe.cluster.model_copy(update={"gpu": gpu.name})
    return recipe.model_copy(update={"cluster": cluster})


def gpu_warnings(recipe: Recipe, gpu: Gpu, stated: str) -> list[str]:
    """Which GPU a common name stands for, and bf16 on a GPU whose matrix units lack it."""
    found = []
    if stated != gpu.name and gpu.memory_bytes:
        found.append(
            f"cluster.gpu: {stated} is taken as {gpu.name}, with {format_bytes(gpu.memory_bytes)}"
        )
    if recipe.precision.startswith("bf16") and not gpu.is_cpu and not gpu.bf16_flops:
        found.append(
            f"precision: {gpu.name} has no matrix units for bf16, which is then many times slower than fp16. "
            "Nearest: precision=fp16"
        )
    return found
