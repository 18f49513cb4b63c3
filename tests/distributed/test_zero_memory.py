"""The closed form of ZeRO against the live tensors of real ranks, counted by the recorder."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_jobs

from drumline.plan.model import Plan
from memory.plans import small_plan

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
LARGER = {**SMALL, "hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 4}
"""For ZeRO-3, whose buffers of a fixed size are 5 % of the small one."""
Case = tuple[int, int, str, int, str]
KINDS = [("bf16", 1), ("bf16", 3), ("fp32", 3)]
CASES: list[Case] = [
    (2, stage, precision, k, "all") for stage in (1, 2, 3) for precision, k in KINDS
]
CASES += [(4, stage, "bf16", 1, "all") for stage in (1, 2, 3)]
CASES += [(2, stage, "bf16", 2, "lora") for stage in (1, 2, 3)]
ADAPTERS: dict[str, dict[str, Any]] = {"all": {}, "lora": {"adapter": {"rank": 32}}}


def plan_of(ranks: int, stage: int, precision: str, k: int, trained: str) -> Plan:
    model = LARGER if stage == 3 else SMALL
    return small_plan("llama", model, b=1, length=64, gpus=ranks, k=k, precision=precision,
                      strategy={"name": f"zero{stage}"}, launch={"launcher": "deepspeed"},
                      cluster={"gpu": "cpu"}, model=ADAPTERS[trained])  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peaks of all cases, each in a file; one start for two ranks, one for four."""
    folder = tmp_path_factory.mktemp("zero")
    for ranks in (2, 4):
        jobs = []
        for case in CASES:
            if case[0] == ranks:
                path = folder / f"{case}.plan.json"
                path.write_text(plan_of(*case).to_json())
                jobs.append(
                    {"kind": "record zero", "plan": str(path), "out": str(folder / f"{case}.json")}
                )
        run_jobs(ranks, jobs, folder / f"start-{ranks}")
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_live_tensors_are_as_planned(recorded: Path, case: Case) -> None:
    """The peak within 3 %; so are those of loading, of forward and backward, and of the optimizer step."""
    peaks = json.loads((recorded / f"{case}.json").read_text())
    memory = plan_of(*case).memory
    assert memory.allocated
    ours = dict(memory.phases)
    ours["backward"] = max(ours["backward"], ours["forward + loss"])
    assert memory.allocated.expected == pytest.approx(max(peaks.values()), rel=0.03)
    for phase in ("load", "backward", "optimizer step"):
        # ZeRO-3 casts the gradients of adapters in pieces that the closed form does not follow.
        near = 0.05 if (case[1], case[4], phase) == (3, "lora", "optimizer step") else 0.03
        assert ours[phase] == pytest.approx(peaks[phase], rel=near), phase
