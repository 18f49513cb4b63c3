"""Every "Nearest" that commands, jobs, runs, data and training can print is followed by some test.

A message without one fails here, so that advice cannot be added without being tried. Those of recipes and
plans are in plan/test_advice_followed.py.
"""

import re
import tomllib

from advice import ROOT, Parts, are_of, followed_words, skeletons

LOWER = ("recipe", "architectures", "plan")
"""The layers whose advice plan/test_advice_followed.py follows."""

ELSEWHERE = {
    "the loss does not use ": "memory/test_trace.py",
    "batch.per_device is 1 already": "needs a GPU that is too small; the changes that it lists: plan/test_advise.py",
    " is not in the cache. Nearest: drumline prepare": "needs the network; out of a cache: train/test_pretrained.py",
    "peft is not installed": "installs a package: test_each_extra_that_is_named_is_one",
    ": wandb is not installed": "installs a package: test_each_extra_that_is_named_is_one",
    ", which is not installed": "installs a package: test_each_extra_that_is_named_is_one",
    "data.audio: ": "installs a package: test_each_extra_that_is_named_is_one",
    "pillow is not installed": "installs a package: test_each_extra_that_is_named_is_one",
    "kubeflow-trainer-api is not installed": "installs a package: test_each_extra_that_is_named_is_one",
    "--run-dir {}: {}. Nearest: {}another --run-dir": "runs/test_run_advice.py",
    "{}. Nearest: {}": "a hint at a command of Slurm's, beside Slurm's own words: cluster/test_slurm.py",
}
"""Words of advice that no `heard` or `Row` tells, and where it is followed, or why it cannot be here."""


def upper() -> list[tuple[str, Parts]]:
    """The messages with advice of the layers above plans."""
    parts = [path for path in (ROOT / "toolkit/drumline").iterdir() if path.name not in LOWER]
    return skeletons(*(str(path) for path in parts if path.is_dir()), str(ROOT / "launchers"))


def is_elsewhere(words: str, parts: Parts) -> bool:
    """Whether this key of `ELSEWHERE` is the message's: words of it, or with gaps all of it."""
    whole = "".join("{}" if part is None else part for part in parts)
    return words == whole if "{}" in words else words in whole


def test_no_advice_is_left_out() -> None:
    """Each message above the plans is followed by a test that says its words, or stands in `ELSEWHERE`."""
    said = set(followed_words())
    left = [
        (where, parts)
        for where, parts in upper()
        if not any(are_of(words, parts) for words in said)
        and not any(is_elsewhere(words, parts) for words in ELSEWHERE)
    ]
    assert left == []


def test_what_is_elsewhere_is_there() -> None:
    """Each key is of a message that exists, and each test file that is named is one."""
    messages = upper()
    for words, place in ELSEWHERE.items():
        assert any(is_elsewhere(words, parts) for _, parts in messages), words
        for file in re.findall(r"\w+/test_\w+\.py", place):
            assert (ROOT / "tests" / file).is_file(), file


def test_words_of_one_message_are_not_of_another() -> None:
    """The same fix of another problem is not taken for it; figures that are filled in do not matter."""
    export = ["--site: an export here uses none. Nearest: --to slurm, or without it"]
    resume = [None, ": a resume here uses none. Nearest: --to slurm, or without it"]
    assert are_of("a resume here uses none", resume)
    assert not are_of("--hold is Slurm's. Nearest: --to slurm, or without it", export)
    assert not are_of("a resume here uses none", export)
    limit: Parts = [
        "time_limit: ",
        None,
        " is over the ",
        None,
        " of ",
        None,
        ". Nearest: time_limit: ",
        None,
    ]
    assert are_of("time_limit: 3-00:00:00 is over the 02:00:00 of partition batch", limit)
    assert not are_of("this user has lab. Nearest: lab", limit)


def test_each_extra_that_is_named_is_one() -> None:
    """`pip install 'drumline[x]'` of a message names an extra of the package, with a package of that name in it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {"accelerate", "deepspeed", "wandb", "tensorboard"}  # launchers and trackers, filled in
    for path in (*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")):
        named |= set(re.findall(r"drumline\[(\w+)\]", path.read_text()))
    assert "kubernetes" in named
    packages = {
        "kubernetes": "kubeflow-trainer-api",
        "adapters": "peft",
        "images": "pillow",
        "audio": "soundfile",
    }
    for name in named:
        assert [p for p in extras[name] if p.startswith(packages.get(name, name))], name
