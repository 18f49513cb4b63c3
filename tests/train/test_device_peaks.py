"""What a rank says of its device's memory, and what the supervisor makes of it."""

from pathlib import Path

import pytest

from drumline.rank_files import RankFiles
from drumline.runs.peaks import memory_entry
from memory.plans import small_plan

torch = pytest.importorskip("torch")


def test_the_largest_of_any_rank_stands_in_the_record(tmp_path: Path) -> None:
    """Peaks come from the ranks' outcome files; one that said nothing is no zero."""
    ranks = [RankFiles(tmp_path, rank) for rank in range(3)]
    for files, size in zip(ranks, (5, 9), strict=False):
        peaks = {"allocated": size, "reserved": size + 1, "device": 20 - size}
        files.write_outcome({"outcome": "finished", "when": 0.0, "memory": peaks})
    entry = memory_entry(small_plan("llama", gpus=2), ranks)
    assert entry["measured"] == {"allocated": 9, "reserved": 10, "device": 15}
    assert entry["predicted"]["allocated"] <= entry["predicted"]["allocated_high"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_real_peaks_of_a_gpu() -> None:
    """Allocated ≤ reserved ≤ device, and a gigabyte more shows in all of them."""
    from drumline.train.device_memory import device_peaks

    torch.zeros(1, device="cuda")
    before = device_peaks()
    held = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    after = device_peaks()
    assert before
    assert after
    assert after["allocated"] <= after["reserved"] <= after["device"]
    for name, size in after.items():
        assert size - before[name] >= held.numel() * 0.99
