"""timm's models by name: a checkpoint in its layout on the hub, its own pixels, and a new head.

timm needs torchvision, whose wheel from PyPI does not load beside a torch for CPUs: it misses two operators. They
are declared in a folder of this test's own, where both packages are installed, so that the test environment has neither.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from advice import heard
from conftest import SOURCES, run_drumline

pytestmark = [pytest.mark.xdist_group("vision"), pytest.mark.heavy]

OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
MADE = """
import sys, timm, torch
from timm.models import save_for_hf
torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=7)
save_for_hf(model, sys.argv[1], safe_serialization=True)
"""
COMPARED = """
import io, json, sys
import numpy as np, timm, torch
from pathlib import Path
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from drumline.data.builtin import synthetic_shapes
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.images import pipeline
from drumline.recipe.image_section import Image
from drumline.recipe.load import load_recipe
from drumline.train.models import ModelBuilder
from PIL import Image as Pillow

folder, recipe = Path(sys.argv[1]), load_recipe(sys.argv[2])
manifest = DatasetManifest(task="classification", fingerprint="", samples=1, validation_samples=0, sequence_length=None, classes=3)
builder = ModelBuilder(recipe, manifest)
model = builder.whole().eval()
file = load_file(folder / "model.safetensors")
ours = {name.removeprefix("timm_model."): value for name, value in model.state_dict().items()}
equal = [name for name, value in file.items() if ours[name].shape == value.shape and torch.equal(ours[name], value)]
plain = timm.create_model("resnet10t", num_classes=7)
plain.load_state_dict(file)
transform = create_transform(**resolve_data_config(json.loads((folder / "config.json").read_text())["pretrained_cfg"]), is_training=False)
made = pipeline(Image(processor=str(folder)), None)
worst = 0.0
for shape in ((40, 40), (300, 201), (57, 333)):
    picture = Pillow.fromarray(np.random.default_rng(shape[0]).integers(0, 255, (*shape, 3), dtype=np.uint8))
    stored = io.BytesIO()
    picture.save(stored, format="PNG")
    pixels = torch.from_numpy(made.pixels(stored.getvalue(), 0, False))
    worst = max(worst, float((pixels - transform(picture)).abs().max()))
features = torch.randn(2, 3, 64, 64)
body = model.timm_model.forward_features(features) - plain.eval().forward_features(features)
print(json.dumps({"other": sorted(file.keys() - set(equal)), "notes": builder.notes, "pixels": worst, "body": float(body.detach().abs().max())}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which Python finds timm and torchvision."""
    folder = tmp_path_factory.mktemp("timm")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "packages"), "timm", "torchvision==0.29.1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"timm and torchvision cannot be installed: {done.stderr[-300:]}")
    (folder / "sitecustomize.py").write_text(OPERATORS)
    return {**os.environ, "PYTHONPATH": f"{folder}:{SOURCES}:{folder / 'packages'}"}


@pytest.fixture(scope="module")
def recipe(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    python(environment, MADE, str(folder / "model"))
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "recipe": "timm", "schema": 1, "seed": 3, "model": {"source": "folder", "path": "./model"},
                "data": {"source": "builtin", "name": "synthetic-shapes", "options": {"rows": 300}, "task": "classification",
                         "image_field": "image", "image": {"processor": "./model", "size": 32, "scale": [0.7, 1.0]},
                         "label_names": ["square", "disc", "cross"], "validation": 0.2, "workers": 1},
                "batch": {"effective": 16, "per_device": 4, "gpus": 2, "accumulation": 2}, "cluster": {"gpu": "cpu"},
                "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 8}, "evaluation": {"every_steps": 8},
            }
        )
    )  # fmt: skip
    return path


def python(environment: dict[str, str], code: str, *arguments: str) -> str:
    """What a program prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout.splitlines() or [""])[-1]


def drumline(environment: dict[str, str], folder: Path, *arguments: str) -> Any:
    return subprocess.run([sys.executable, "-m", "drumline.cli", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip


def test_weights_and_pixels_are_those_of_timm(environment: dict[str, str], recipe: Path) -> None:
    """All but the classifier, which is new, for the classes of the data; the pixels are those of its evaluation."""
    found = json.loads(python(environment, COMPARED, str(recipe.parent / "model"), str(recipe)))
    assert found["other"] == ["fc.bias", "fc.weight"]
    assert "timm_model.fc.bias, timm_model.fc.weight" in found["notes"][0]
    assert found["body"] == 0
    assert found["pixels"] < 1e-5


def test_it_trains_and_is_exported(environment: dict[str, str], recipe: Path) -> None:
    """Under torchrun with two ranks; transformers reads the export."""
    folder = recipe.parent
    done = drumline(environment, folder, "run", "recipe.yaml", "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 8
    assert drumline(environment, folder, "export", "run", "out").returncode == 0
    read = "import sys, transformers; m = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1]); print(m.config.num_labels, m.config.architecture)"  # fmt: skip
    assert python(environment, read, str(folder / "out")) == "3 resnet10t"
    traced = drumline(environment, folder, "plan", "recipe.yaml", "--trace", "--json")
    assert json.loads(traced.stdout)["memory"]["method"] == "traced"


def test_without_timm_it_is_said_what_to_install(recipe: Path) -> None:
    done = run_drumline(recipe.parent, "run", "recipe.yaml", "--run-dir", "none")
    assert done.returncode != 0
    assert heard("Nearest: pip install timm torchvision", done.stderr + done.stdout)
