"""Whether a factory's model has BatchNorm is read from its source, or said to be unknown; never guessed."""

from pathlib import Path

import pytest

from drumline.data.batchnorm import batchnorm_of
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan

FILES = {
    "plain": "from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n",
    "direct": "from torch import nn\ndef make():\n    return nn.BatchNorm1d(2)\n",
    "indirect": "from torch import nn\nclass Block(nn.Module):\n    def __init__(self):\n"
                "        self.norm = nn.BatchNorm2d(3)\ndef make():\n    return Block()\n",
    "unused": "from torch import nn\ndef other():\n    return nn.BatchNorm1d(2)\ndef make():\n    return nn.Identity()\n",
    "foreign": "import torchvision\ndef make():\n    return torchvision.models.resnet50()\n",
    "foreign_name": "from timm import create_model\ndef make():\n    return create_model('resnet18')\n",
    "foreign_inside": "def make():\n    from timm.models import resnet as r\n    return r.resnet18()\n",
    "foreign_unused": "import torchvision\nfrom torch import nn\ndef make():\n    return nn.Linear(2, 2)\n",
    "hub": "from torch import hub\ndef make():\n    return hub.load('a', 'b')\n",
    "other_file": "import plain\ndef make():\n    return plain.make()\n",
    "other_file_norm": "import indirect\ndef make():\n    return indirect.make()\n",
    "other_name": "from direct import make as build\ndef make():\n    return build()\n",
    "other_foreign": "from foreign import make as build\ndef make():\n    return build()\n",
    "standard": "import math, functools\nfrom torch import nn\ndef make():\n    return nn.Linear(int(math.pi), 2)\n",
}  # fmt: skip
RIGHT = {"direct": "yes", "indirect": "yes", "other_file_norm": "yes", "other_name": "yes",
         "foreign": "unknown", "foreign_name": "unknown", "foreign_inside": "unknown", "hub": "unknown",
         "other_foreign": "unknown"}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_source_is_followed_through_the_project(tmp_path: Path, name: str) -> None:
    """Through classes, other files and imports inside functions; another package's models are unknown."""
    for stem, text in FILES.items():
        (tmp_path / f"{stem}.py").write_text(text)
    assert batchnorm_of(f"{name}:make", str(tmp_path)) == RIGHT.get(name, "no")


def test_plan_promises_nothing_of_a_package_that_it_has_not_built(tmp_path: Path) -> None:
    """torchvision's ResNet-50 has BatchNorm outside the factory's own file."""
    (tmp_path / "mine.py").write_text(
        FILES["foreign"] + "def rows():\n    yield {'features': [1.0, 2.0], 'label': 0}\n"
    )
    (tmp_path / "r.yaml").write_text(
        "recipe: r\nschema: 1\nmodel: {source: factory, factory: 'mine:make'}\n"
        "data: {source: factory, factory: 'mine:rows', task: classification, samples: 8}\n"
        "batch: {per_device: 2, gpus: 1, accumulation: 1}\ncluster: {gpu: cpu}\n"
        "optimizer: {name: sgd, lr: 0.1}\nduration: {steps: 1}\n"
    )
    found = make_plan(load_recipe(str(tmp_path / "r.yaml"), [])).split_invariance
    assert (found.level, "unknown until built" in found.why) == ("none", True)
