"""The built wheel: installed into an environment of its own, it finds its recipes and plans."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from conftest import ROOT


def test_the_wheel_is_complete_and_runs(tmp_path: Path) -> None:
    """Built from the source distribution of the tracked files, installed without the checkout in sight.

    Nothing is compiled; from it: recipes, a plan, a dry run, an import, `import drumline`.
    """
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("drumline/shipped_recipes/tiny-code-lm.yaml", "drumline/shipped_recipes/example_models.py",
                   "drumline/shipped_recipes/recipe.schema.json", "drumline/recipe/keys.yaml", "drumline/session/plan_page.css",
                   "drumline/session/importing/not_carried.yaml", "drumline/compare/report.html", "drumline/architectures/gpus.yaml", "drumline_launchers/torchrun.py"):  # fmt: skip
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if ".dist-info" not in top} == {"drumline", "drumline_launchers"}
    env_folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env_folder)], check=True)
    site = next((env_folder / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def drumline(*arguments: str) -> str:
        code = "from drumline.cli import main; main()"
        command = [str(env_folder / "bin/python"), "-P", "-c", code, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout

    where = "import drumline; print(drumline.__file__)"
    found = subprocess.run([str(env_folder / "bin/python"), "-P", "-c", where], cwd=tmp_path, env=env,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert str(site) in found
    assert "tiny-code-lm" in drumline("recipes", "ls")
    assert "256 = 2 per_device × 8 gpus × 16 accumulation" in drumline("plan", "llama-8b-8xh100")
    assert "torch.distributed.run" in drumline("run", "worked-example", "--dry-run")
    shutil.copy(ROOT / "docs/examples/axolotl.yml", tmp_path / "mine.yml")
    assert "keys carried over" in drumline("import", "mine.yml", "--gpus", "4")
    assert (tmp_path / "recipe.schema.json").is_file()
    planned = "import drumline; print(repr(drumline.plan('llama-8b-8xh100')))"
    found = subprocess.run([str(env_folder / "bin/python"), "-P", "-c", planned], cwd=tmp_path, env=env,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert "256 = 2 × 8 × 16, fits" in found
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt")))
    assert b"drumline = drumline.cli:main" in entry
