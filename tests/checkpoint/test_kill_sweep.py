"""No kill at any moment of a save leaves a mixture, or nothing, or a start that fails."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from conftest import ROOT, SOURCES

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": f"{SOURCES}:{ROOT}/tests/train", "OMP_NUM_THREADS": "1"}


def test_a_kill_at_every_point_of_a_save_leaves_the_old_or_the_new() -> None:
    """SIGKILL before and after every file operation of either rank, and within a shard: ≥ 200 trials."""
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_sweep.py"), "200"],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    results = found["results"]
    assert len(results) >= 200
    assert all(trial["died"] for trial in results)
    wrong = [trial for trial in results if trial.get("error") or trial["mixed"] or trial["said"]]
    assert not wrong, wrong[:3]
    steps = Counter((trial["rank"], trial["step"]) for trial in results)
    assert {step for _, step in steps} == {1, 2}
    assert steps[0, 1] > 20 and steps[0, 2] > 10, steps  # rank 0 publishes and deletes: both sides
    assert all(trial["left"] == ["step-00000003"] for trial in results)
    print(f"{len(results)} kills over {found['counts']} operations: {steps}")


SAVE = """
import sys
from pathlib import Path
from savers import one_saver, pieces, tensors
from drumline.checkpoint.state import TrainState
folder = Path(sys.argv[1])
saver = one_saver(folder)
saver.save(pieces(tensors(1), 0, 1, False), TrainState(step=1))
saver.wait()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_files_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path) -> None:
    """fsync of every file < fsync of the folder < rename < fsync of the parent, as the kernel saw it."""
    traced = tmp_path / "trace"
    folder = tmp_path / "c"
    folder.mkdir()
    subprocess.run(
        ["strace", "-f", "-y", "-o", str(traced), "-e", "trace=fsync,fdatasync,rename,renameat,renameat2",
         sys.executable, "-c", SAVE, str(folder)],
        env=ENV, check=True, timeout=120,
    )  # fmt: skip
    calls = [
        line.split(None, 1)[1] for line in traced.read_text().splitlines() if str(folder) in line
    ]
    final, temporary = f"{folder}/step-00000001", f"{folder}/.step-00000001.tmp"

    def place(*words: str) -> int:
        found = [n for n, call in enumerate(calls) if all(word in call for word in words)]
        assert found, (words, calls)
        return found[-1]

    publish = place("rename", f'"{temporary}"', f'"{final}"')
    for name in (
        "rank-0.safetensors",
        ".rank-0.json.part",
        ".state.json.part",
        ".manifest.json.part",
    ):
        assert place("fsync(", f"<{temporary}/{name}>") < publish
        if name.endswith(".part"):
            renamed = place(
                "rename", f"{temporary}/{name}", name.removeprefix(".").removesuffix(".part")
            )
            assert place("fsync(", f"<{temporary}/{name}>") < renamed < publish
    assert place("rename", "manifest.json") < place("fsync(", f"<{temporary}>") < publish
    assert publish < place("fsync(", f"<{folder}>")
