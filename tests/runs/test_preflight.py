"""Pre-flight: which pairs are measured, who is called slow, and the real thing on this machine."""

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from conftest import SOURCES
from drumline.cluster.preflight import bandwidths, slow_nodes
from drumline.cluster.site import facts_of, validate_site
from drumline.plan.model import SiteFacts
from drumline.recipe import yaml12
from drumline.train.bandwidth import bus_bandwidth, neighbours


@pytest.mark.parametrize("nodes", range(1, 18))
def test_every_node_has_two_neighbours(nodes: int) -> None:
    """No node twice in a round; each pair once; the pairs are the ring."""
    rounds = neighbours(nodes)
    for pairs in rounds:
        named = list(itertools.chain(*pairs))
        assert len(named) == len(set(named))
    found = [frozenset(pair) for pairs in rounds for pair in pairs]
    ring = {frozenset({node, (node + 1) % nodes}) for node in range(nodes)} - {frozenset({0})}
    assert set(found) == ring
    assert len(found) == len(ring)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """8 ranks, 1 GB in 0.01 s: 100 GB/s of algorithm bandwidth, times 2 × 7 / 8."""
    assert bus_bandwidth(10**9, 8, 0.01) == pytest.approx(175.0)


def report(**within: float | None) -> dict[str, Any]:
    return {
        "nodes": [
            {"host": h, "within": w, "between": 20.0, "copy": 50.0} for h, w in within.items()
        ]
    }


def test_a_node_below_the_ratio_is_named_with_its_figures() -> None:
    """The others' median counts, so one slow node does not hide itself."""
    slow = slow_nodes(report(a=400.0, b=150.0, c=410.0), 0.8)
    assert slow == {"b": "all-reduce within the node 150 GB/s, the others' median is 405"}
    assert slow_nodes(report(a=400.0, b=330.0), 0.8) == {}
    assert list(slow_nodes(report(a=400.0, b=300.0), 0.8)) == ["b"]
    assert slow_nodes(report(a=None, b=None), 0.8) == {}
    assert slow_nodes(report(a=1.0), 0.8) == {}


def test_the_medians_are_a_line_of_a_site_file() -> None:
    """As a site reads it; what was not measured is left out."""
    line = bandwidths(report(a=400.0, b=150.0, c=410.0))
    site = validate_site({"site": "ours", **yaml12.parse(line)}, "site")
    assert facts_of(site) == SiteFacts(within=400.0, between=20.0, copy=50.0)
    assert bandwidths(report(a=None)) == "bandwidths: {between: 20, copy: 50}"


def test_this_machine_is_measured() -> None:
    """`drumline doctor --preflight --json`: real ranks, real figures."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
        "PYTHONPATH": SOURCES
    }
    command = [sys.executable, "-m", "drumline.cli", "doctor", "--preflight", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (node,) = found["nodes"]
    assert node["within"] > 0
    assert node["copy"] > 0
    assert node["between"] is None
    assert found["slow"] == {}
