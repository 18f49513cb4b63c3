"""The kinds of GPU that a recipe may name, read from gpus.yaml."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from drumline.errors import PlanError
from drumline.recipe import yaml12
from drumline.units import GIB


@dataclass(frozen=True)
class Gpu:
    """One kind of device; memory in bytes, None for cpu, where it is that of the machine."""

    name: str
    memory_bytes: int | None
    bf16_flops: float | None
    workspace_bytes: int
    has_flash: bool = True

    @property
    def is_cpu(self) -> bool:
        """Whether training runs on the CPU."""
        return self.name == "cpu"


@cache
def find_gpu(name: str) -> Gpu:
    """The device of this name; raises PlanError with the nearest name if there is none."""
    rows = yaml12.parse((Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8"))
    if name not in rows:
        from difflib import get_close_matches

        longer = [known for known in rows if known.startswith(name.lower())]
        close = longer or get_close_matches(name.lower(), rows, n=1, cutoff=0.4)
        fix = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(rows)}"
        raise PlanError(f"cluster.gpu: {name!r} is not in the table. {fix}")
    row = rows[name]
    memory, tflops = row["memory_gib"], row["bf16_tflops"]
    return Gpu(
        name,
        None if memory is None else int(memory * GIB),
        None if tflops is None else tflops * 1e12,
        row["workspace_mib"] << 20,
        row.get("flash", True),
    )
