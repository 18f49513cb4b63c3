"""A run whose GPUs are not here is refused before anything is prepared or written."""

import ctypes
import os
from pathlib import Path

import pytest

from advice import command, heard
from conftest import tiny_recipe
from drumline.errors import LaunchError
from drumline.recipe.load import validate
from drumline.session import devices

pytestmark = pytest.mark.skipif(
    os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd"), reason="this machine has a GPU"
)


def test_no_gpu_is_told_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the data would have to be prepared first; what does not fit anywhere stays exit 3."""
    monkeypatch.chdir(tmp_path)
    for change in ((), ("duration.steps=null", "duration.epochs=1")):
        done = command("run", "tiny-code-lm", "cluster.gpu=h100-80gb", *change)
        assert done.code == 2
        heard("which shows 0 GPUs. Nearest: cluster.gpu=cpu", done.err)
        assert not list(tmp_path.iterdir())
    assert command("run", "llama-8b-8xh100", "--gpus", "8", "--gpu", "t4").code == 3


def test_fewer_gpus_than_the_plan_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is a made-up one, as there is no driver here."""
    recipe = validate(tiny_recipe(cluster={"gpu": "l4"}), "r")
    monkeypatch.setattr(devices, "gpus_here", lambda: 1)
    devices.check_gpus(recipe, wanted=1)
    with pytest.raises(LaunchError) as error:
        devices.check_gpus(recipe, wanted=2)
    heard("which shows 1 GPUs. Nearest: batch.gpus=1 batch.accumulation=null", str(error.value))
    monkeypatch.setattr(devices, "gpus_here", lambda: None)
    devices.check_gpus(recipe, wanted=2)


def test_what_the_driver_says_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for libcuda, which no machine without a GPU has: its count, and 0 where it cannot start."""

    class Driver:
        def __init__(self, error: int) -> None:
            self.error = error

        def cuInit(self, flags: int) -> int:
            return self.error

        def cuDeviceGetCount(self, count: object) -> int:
            ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 4  # type: ignore[arg-type]
            return 0

    assert devices.gpus_here() == 0
    for error, count in ((0, 4), (100, 0)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, error=error: Driver(error))
        assert devices.gpus_here() == count
