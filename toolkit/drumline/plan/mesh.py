"""The layout of a run's ranks over nodes, replicas of the state, and samples.

gpus = replicas × shards × context × tensor, where context and tensor parallelism are 1 for now. With them,
these three sets of ranks will differ, so callers must already ask for the one that they mean:

- data ranks read different samples (G of the batch equation);
- averaging ranks are those over which the engine averages a gradient;
- writers each write a part of a checkpoint.
"""

from dataclasses import dataclass

from drumline.errors import PlanError
from drumline.plan.batch import Split, nearest_to
from drumline.recipe.schema import NodeRange, Recipe
from drumline.units import divisors

LARGEST_NODE = 8


@dataclass(frozen=True)
class Mesh:
    """`ranks` processes, `ranks_per_node` on each node; `shards` ranks hold one replica of the state.

    Ranks are numbered node by node, and within a replica shard by shard.
    """

    ranks: int
    ranks_per_node: int
    shards: int = 1

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.ranks // self.ranks_per_node

    @property
    def replicas(self) -> int:
        """Number of copies of the model's state."""
        return self.ranks // self.shards

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different samples."""
        return self.ranks

    def data_rank(self, rank: int) -> int:
        """The data rank of a rank, from 0; ranks that read the same samples have the same data rank."""
        return rank

    def reader(self, data_rank: int) -> int:
        """The first rank that reads this data rank's samples."""
        return data_rank

    @property
    def averaging_ranks(self) -> int:
        """Number of ranks over which engines average gradients; the sum is the average times this."""
        return self.ranks

    def writer(self, number: int) -> int:
        """The rank that saves the `number`-th unsharded tensor; tensors are assigned round-robin."""
        return number % self.ranks

    def node(self, rank: int) -> int:
        """The node that a rank is on, from 0."""
        return rank // self.ranks_per_node


def mesh_of(recipe: Recipe, gpus: int, nodes: int | None = None) -> Mesh:
    """The mesh of a recipe on `gpus` GPUs; `nodes` is derived from the cluster section if not given."""
    ranks_per_node = gpus // nodes if nodes else min(gpus, gpus_per_node(recipe, gpus))
    sharded = recipe.strategy.name not in ("ddp",)
    shards = (ranks_per_node if recipe.strategy.shard == "node" else gpus) if sharded else 1
    return Mesh(ranks=gpus, ranks_per_node=ranks_per_node, shards=shards)


def gpus_per_node(recipe: Recipe, gpus: int) -> int:
    """GPUs per node: as stated; else gpus / nodes if nodes is a number; else gpus' largest divisor up to 8.

    On CPU, if neither is stated, all processes share one node. A stated number may exceed the GPUs that the
    run uses.
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
    """Whether the cluster section allows this number of GPUs: part of one node, or whole nodes."""
    per_node, nodes = gpus_per_node(recipe, gpus), recipe.cluster.nodes
    if gpus > per_node and gpus % per_node:
        return False
    count = max(1, gpus // per_node)
    if isinstance(nodes, NodeRange):
        return nodes.min <= count <= nodes.max
    return nodes is None or count == nodes


def layout(recipe: Recipe, split: Split) -> Mesh:
    """The mesh of a split.

    Raises PlanError if the cluster section does not allow its number of GPUs, with the nearest legal number
    that divides the batch, if there is one.
    """
    if is_laid_out(recipe, split.gpus):
        return mesh_of(recipe, split.gpus)
    per_node = gpus_per_node(recipe, split.gpus)
    legal = [n for n in divisors(split.effective // split.per_device) if is_laid_out(recipe, n)]
    fixes = [f"gpus {nearest_to(split.gpus, legal)}"] if legal else []
    nodes = recipe.cluster.nodes
    if split.gpus > per_node and split.gpus % per_node:
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
            f"{max(1, split.gpus // per_node)} nodes, outside {nodes.min} to {nodes.max}"
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
    """GPUs of the cluster section, or None if it does not state both numbers.

    For a range of nodes: the largest number that divides the batch, or the largest one if none does.
    """
    nodes, per_node, batch = recipe.cluster.nodes, recipe.cluster.gpus_per_node, recipe.batch
    if not nodes or not per_node:
        return None
    if isinstance(nodes, int):
        return nodes * per_node
    others = (batch.per_device or 1) * (batch.accumulation or 1)
    counts = [n * per_node for n in range(nodes.max, nodes.min - 1, -1)]
    dividing = [g for g in counts if not batch.effective or batch.effective % (g * others) == 0]
    return dividing[0] if dividing else counts[0]
