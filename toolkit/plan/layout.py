"""How many nodes a number of GPUs makes; the node size must divide it."""

from dataclasses import dataclass

from toolkit.errors import PlanError
from toolkit.plan.batch import Split, nearest_to
from toolkit.recipe.schema import NodeRange, Recipe
from toolkit.units import divisors

LARGEST_NODE = 8


@dataclass(frozen=True)
class Layout:
    """Nodes × GPUs per node."""

    nodes: int
    gpus_per_node: int


def gpus_per_node(recipe: Recipe, gpus: int) -> int:
    """As stated; else from the number of nodes; else the largest divisor of gpus up to 8.

    On CPU, where nothing is stated, all processes share one node.
    """
    cluster = recipe.cluster
    if cluster.gpus_per_node:
        return cluster.gpus_per_node
    if isinstance(cluster.nodes, int):
        return max(1, gpus // cluster.nodes)
    if cluster.gpu == "cpu":
        return gpus
    return max(d for d in range(1, LARGEST_NODE + 1) if gpus % d == 0)


def is_laid_out(recipe: Recipe, gpus: int) -> bool:
    """Whether the cluster section allows this number of GPUs."""
    per_node, nodes = gpus_per_node(recipe, gpus), recipe.cluster.nodes
    if gpus % per_node:
        return False
    if isinstance(nodes, NodeRange):
        return nodes.min <= gpus // per_node <= nodes.max
    return nodes is None or gpus == nodes * per_node


def layout(recipe: Recipe, split: Split) -> Layout:
    """The nodes of a split; PlanError with the nearest GPU count that divides the batch."""
    per_node = gpus_per_node(recipe, split.gpus)
    if is_laid_out(recipe, split.gpus):
        return Layout(split.gpus // per_node, per_node)
    legal = [n for n in divisors(split.effective // split.per_device) if is_laid_out(recipe, n)]
    fixes = [f"gpus {nearest_to(split.gpus, legal)}"] if legal else []
    nodes = recipe.cluster.nodes
    if split.gpus % per_node:
        fixes.append(
            f"gpus_per_node {max(d for d in range(1, per_node + 1) if split.gpus % d == 0)}"
        )
        what = (
            f"cluster.gpus_per_node: {per_node} does not divide {split.gpus} gpus "
            f"({split.gpus} / {per_node} = {split.gpus / per_node:.2f})"
        )
    elif isinstance(nodes, NodeRange):
        what = (
            f"cluster.nodes: {split.gpus} gpus / {per_node} gpus_per_node = "
            f"{split.gpus // per_node} nodes, outside {nodes.min} to {nodes.max}"
        )
    else:
        assert nodes
        fixes.append("cluster.nodes null")
        what = (
            f"cluster: {nodes} nodes × {per_node} gpus_per_node = {nodes * per_node}, "
            f"not gpus {split.gpus}"
        )
    raise PlanError(f"{what}. Nearest: {'; or '.join(fixes)}")


def cluster_gpus(recipe: Recipe) -> int | None:
    """GPUs that the cluster section states: of a node range, the largest that divides the batch."""
    nodes, per_node, batch = recipe.cluster.nodes, recipe.cluster.gpus_per_node, recipe.batch
    if not nodes or not per_node:
        return None
    if isinstance(nodes, int):
        return nodes * per_node
    others = (batch.per_device or 1) * (batch.accumulation or 1)
    counts = [n * per_node for n in range(nodes.max, nodes.min - 1, -1)]
    dividing = [g for g in counts if not batch.effective or batch.effective % (g * others) == 0]
    return dividing[0] if dividing else counts[0]
