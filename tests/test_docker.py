"""The images, without building them: what they copy exists, what they install is pinned, nobody is root."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

FILES = sorted((ROOT / "docker").glob("Dockerfile*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines if line.strip()
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image(path: Path) -> None:
    """Copied paths exist and are not ignored; the base has a version; pip is constrained; lists are removed."""
    found = instructions(path)
    by_name: dict[str, list[str]] = {}
    for name, words in found:
        by_name.setdefault(name, []).append(words)
    ignored = {line.strip("*/") for line in (ROOT / ".dockerignore").read_text().split()}
    for words in by_name["COPY"]:
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source not in ignored
    for base in by_name["FROM"]:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+[\w.-]*", base), f"{base} has no full version"
    for words in by_name["RUN"]:
        if "pip install" in words:
            assert "-c /opt/drumline/constraints.txt" in words
        if "apt-get install" in words:
            assert "--no-install-recommends" in words
            assert "rm -rf /var/lib/apt/lists/*" in words
        assert "sudo" not in words
        assert "curl" not in words
    names = [name for name, _ in found]
    assert by_name["USER"] == ["drumline"]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    assert by_name["ENTRYPOINT"] == ['["drumline"]']
    assert "ADD" not in by_name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_in_a_layer(path: Path) -> None:
    """No argument, variable or file of a secret's name or shape."""
    from drumline.secrets import Secrets, is_secret_file, is_secret_name

    for name, words in instructions(path):
        assert not Secrets({}).are_in(words)
        if name in ("ARG", "ENV"):
            assert not [key for key in re.findall(r"(\w+)=", words) if is_secret_name(key)]
        if name == "COPY":
            assert not [source for source in words.split() if is_secret_file(source)]


def test_every_package_that_is_installed_is_pinned() -> None:
    """Each dependency and each extra of an image stands in constraints.txt with one version."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    used = {
        extra
        for path in FILES
        for words in re.findall(r"drumline\[([\w,]+)\]", path.read_text())
        for extra in words.split(",")
    }
    assert used <= set(extras)
    wanted = [*project["dependencies"], *(package for extra in used for package in extras[extra])]
    for package in wanted:
        name = re.match(r"[\w-]+", package)
        assert name
        assert name[0].lower() in pinned, package


def test_the_compose_file_builds_these_files() -> None:
    """Each service's Dockerfile exists, nobody is root, secrets are names without values."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert {service["build"]["dockerfile"] for service in services.values()} == {
        f"docker/{path.name}" for path in FILES
    }
    for service in services.values():
        assert service["user"] == "${UID:-10001}:${GID:-10001}"
        assert all("=" not in name for name in service.get("environment", []))


def test_their_pip_lines_resolve(tmp_path: Path) -> None:
    """No engine builds images here, so: what both files copy, in a folder; what they tell pip, in one environment.

    pip resolves, and builds what has to be built, but installs nothing (`--dry-run`). One call for all lines, which
    share their constraints, because each downloads the same packages.
    """
    image = tmp_path / "opt/drumline"
    image.mkdir(parents=True)
    copied = [
        {
            source
            for name, words in instructions(path)
            if name == "COPY"
            for source in words.split()[:-1]
        }
        for path in FILES
    ]
    assert copied[0] == copied[1]
    for source in copied[0]:
        place = ROOT / source
        (shutil.copytree if place.is_dir() else shutil.copy)(place, image / place.name)
    asked: dict[str, None] = {}
    for path in FILES:
        for name, words in instructions(path):
            if name == "RUN" and "pip install" in words:
                plain = re.sub(r"\$\{TORCH_INDEX:\+[^}]*\}", "", words).replace(
                    "/opt/drumline", str(image)
                )
                flag, constraints, *packages = shlex.split(plain.removeprefix("pip install"))
                assert (flag, constraints) == ("-c", f"{image}/constraints.txt")
                asked |= dict.fromkeys(packages)
    extras = [re.fullmatch(r".*\[([\w,]+)\]", one) for one in asked]
    wanted = ",".join(found[1] for found in extras if found)
    plain = [one for one, found in zip(asked, extras, strict=True) if not found]
    assert plain == ["torch"]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    command = [
        str(tmp_path / "env/bin/python"),
        "-m",
        "pip",
        "install",
        "-q",
        "--dry-run",
        "-c",
        f"{image}/constraints.txt",
        *plain,
        f"{image}[{wanted}]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
