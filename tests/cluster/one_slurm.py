"""The fixture that starts a Slurm for a module; xdist's group keeps such modules on one worker."""

from collections.abc import Iterator

import pytest
from lab import Lab, why_not


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Eight nodes, started and stopped here; a skip with the reason where Slurm cannot run."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    lab = Lab(tmp_path_factory.mktemp("slurm") / "lab")
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
