"""How long an optimizer step takes: an estimate by kinds of work, and its parts. Pure.

A micro-batch is a sum of matrix products and attention at shares of the card's peak, and of elementwise
operations, losses and updates at a share of its memory's bandwidth; kernels that the host cannot launch in
time set a lower bound. Collectives run beside it. The shares reproduce the published throughputs of
llm-foundry (tests/plan/test_throughput.py); the host's time is that of our own measurements on an H100
(benchmarks/step_time/), to which the bytes of eager operations were held, too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from drumline.architectures.gpus import Gpu, find_gpu
from drumline.architectures.shapes import ModelShape, layer_tensors
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision


@dataclass(frozen=True)
class Rates:
    """What cards and their libraries reach; each share is of the figure in the table of cards.

    `matrices`, `attention`: of the peak, in FLOP/s. `memory`, `link`, `network`: of bandwidths. `overlap`:
    of a micro-batch's time in which collectives can run unseen. `elementwise`: bytes that eager operations
    move, of those counted here. `logit_bytes`: moved for a logit, forward and backward; `update_bytes`: for
    a parameter. `launch_s`: of the host, for a layer's forward. `latency_s`: of a layer's collectives, for
    each doubling of the ranks; `straggling`: share by which the slowest node is late, for each doubling of
    the nodes. `fixed_s`: of a step.
    """

    matrices: float = 0.7
    attention: float = 0.3
    memory: float = 0.8
    link: float = 0.75
    network: float = 0.67
    overlap: float = 0.32
    elementwise: float = 1.1
    logit_bytes: float = 28.0
    update_bytes: float = 40.0
    launch_s: float = 1.1e-3
    straggling: float = 0.0126
    latency_s: float = 6e-6
    fixed_s: float = 0.002


_AMPERE = Rates(matrices=0.77, attention=0.316)
_HOPPER = Rates(matrices=0.635, attention=0.17)
FITTED = {
    "a100-40gb": _AMPERE,
    "a100-80gb": _AMPERE,
    "h100-80gb": _HOPPER,
    "h200": _HOPPER,
    "gh200-96gb": _HOPPER,
}
"""Cards whose rates are fitted to published runs, the last two as cards with the chip of another."""

_COMPILED = 0.35
"""Bytes of elementwise operations that remain when torch.compile fuses them; an assumption."""
_COMPILED_LAUNCHES = 0.25
_BACKWARD_OF_ATTENTION = 2.5
"""Of flash attention's forward: five products instead of two (Dao 2023, FlashAttention-2, §4)."""
_HOST_BYTES_PER_S = 20e9
"""Assumed of a copy between a GPU and the host's memory, where a site has not measured it."""
_NETWORKS = ((400e9, 50e9), (250e9, 25e9), (0.0, 3e9))
"""Assumed bytes per second and GPU between nodes, for cards with at least such links within one."""
_WRITTEN_BYTES_PER_S = 2e9
"""Assumed of a node's writes to its file system, for saves that are waited for."""
_FP32_SHARE = 1 / 16
"""Of the 16-bit peak, without TF32."""
_FLOPS_PER_BYTE = 200
"""Peak over bandwidth of a card whose bandwidth is not known."""
_FALLBACK_FLOPS = 100e12


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on each rank, by what they are spent on."""

    matrices: float
    attention: float
    elementwise: float
    loss: float
    update: float
    communication: float
    host: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(vars(self).values()))


def step_time(plan: Plan, shape: ModelShape, rates: Rates | None = None) -> StepTime:
    """The time of a step of a plan; `communication` and `host` are what the GPU waits for, in sum."""
    case = _Case(plan, shape, plan.batch.per_device, rates)
    k = plan.batch.accumulation
    matrices, attention, elementwise, loss = case.micro_batch()
    busy = matrices + attention + elementwise + loss
    idle = max(0.0, case.launches() - busy)
    micro, step = case.collectives()
    hidden = case.rates.overlap * (busy + idle)
    waits = k * max(0.0, micro - hidden) + max(0.0, step - hidden) + k * case.latency()
    waits += k * (busy + idle) * case.rates.straggling * math.log2(plan.mesh.nodes)
    return StepTime(
        matrices=k * matrices,
        attention=k * attention,
        elementwise=k * elementwise,
        loss=k * loss,
        update=case.update(),
        communication=waits + case.offload(),
        host=k * idle,
        fixed=case.rates.fixed_s,
    )


def evaluation_seconds(plan: Plan, shape: ModelShape, rows: int) -> float:
    """Seconds of one evaluation of so many rows: forwards without gradients, split over all ranks."""
    evaluation = plan.recipe.row_evaluation
    assert evaluation
    case = _Case(plan, shape, evaluation.per_device or plan.batch.per_device)
    forwards = math.ceil(rows / (case.rows * plan.mesh.data_ranks))
    return forwards * case.forward()


def save_seconds(plan: Plan) -> float:
    """Seconds that ranks wait for a save: each copies its part to the host, and if not async writes it."""
    part = ((plan.cost.checkpoint_bytes or 0) - plan.cost.frozen_bytes) / plan.batch.gpus
    seconds = part / copy_rate(plan)
    if not plan.recipe.checkpoint.asynchronous:
        seconds += part * plan.mesh.ranks_per_node / _WRITTEN_BYTES_PER_S
    return seconds


def copy_rate(plan: Plan) -> float:
    """Bytes per second of copies between a GPU and the host's memory."""
    return 1e9 * plan.site.copy if plan.site.copy else _HOST_BYTES_PER_S


def rates_of(gpu: Gpu) -> Rates:
    """The rates of a card: fitted ones, or those that most cards are near; a CPU launches no kernels."""
    if gpu.is_cpu:
        return Rates(launch_s=0.0, fixed_s=0.0)
    return FITTED.get(gpu.name, Rates())


def gpu_seconds(plan: Plan, shape: ModelShape) -> float:
    """GPU time of one optimizer step in seconds: step time × GPUs."""
    return plan.batch.gpus * step_time(plan, shape).total


class _Case:
    """One plan's step: sizes of a rank's micro-batch, and times of its parts."""

    def __init__(
        self, plan: Plan, shape: ModelShape, rows: int, rates: Rates | None = None
    ) -> None:
        """`rows`: of a micro-batch."""
        recipe = plan.recipe
        self.plan, self.shape, self.rows = plan, shape, rows
        self.gpu = find_gpu(recipe.cluster.gpu)
        self.rates = rates = rates or rates_of(self.gpu)
        self.precision = find_precision(recipe.precision, recipe.strategy.name)
        peak = self.gpu.narrow_flops or _FALLBACK_FLOPS
        bandwidth = self.gpu.bandwidth or peak / _FLOPS_PER_BYTE
        self.flops_per_s = peak * (_FP32_SHARE if self.precision.computed == 4 else 1)
        self.bytes_per_s = bandwidth * rates.memory
        self.length = _padded_length(plan, shape, rows)
        self.tokens = rows * recipe.objective.facts.sequences * self.length
        trained, held = plan.cost.trained, plan.cost.parameters
        self.trained = trained or shape.parameters
        self.passes = 3 if trained == held else 2  # a frozen weight has no gradient
        policy = recipe.model.activation_checkpointing
        self.repeats_layers = policy == "full"
        self.repeats_elementwise = policy != "none"
        self.is_compiled = bool(recipe.model.compile)
        self.is_sharded = recipe.strategy.name in ("fsdp", "zero3")

    def micro_batch(self) -> tuple[float, float, float, float]:
        """Seconds of matrix products, attention, elementwise operations and the loss of a micro-batch."""
        matrices, attention, elementwise = self._layers()
        again = float(self.repeats_layers)
        return (
            matrices * (self.passes + again),
            attention * (1 + _BACKWARD_OF_ATTENTION + again),
            elementwise * (3 + self.repeats_elementwise) + self._casts(),
            self._loss(),
        )

    def forward(self) -> float:
        """Seconds of a forward without gradients, or of gathering its weights where that takes longer."""
        busy = sum(self._layers()) + (self._casts() + self._loss()) / 3
        return max(busy, self.shape.layers * self._launch(), self._gather())

    def _layers(self) -> tuple[float, float, float]:
        """Seconds of matrix products, attention and elementwise operations of all layers' forward."""
        matrices = attention = moved = 0.0
        for shape, number in self.shape.layer_shapes:
            matrices += number * sum(self._product(*sizes) for sizes in self._matrices(shape))
            attention += number * self._attention(shape)
            moved += number * self.tokens * self._bytes_per_token(shape)
        elementwise = moved * self.rates.elementwise / self.bytes_per_s
        if self.is_compiled:
            elementwise *= _COMPILED
        return matrices, attention, elementwise

    def _matrices(self, shape: ModelShape) -> Iterator[tuple[float, int, int, int]]:
        """Rows, inputs, outputs and copies of each matrix that a layer's tokens are multiplied with."""
        for name, sizes in layer_tensors(shape).items():
            if len(sizes) == 3:
                yield self.tokens * shape.top_k, sizes[1], sizes[2], sizes[0]
            elif len(sizes) == 2 and name != "distances":
                yield self.tokens, sizes[0], sizes[1], 1

    def _product(self, rows: float, inputs: int, outputs: int, copies: int = 1) -> float:
        """Seconds of a product: its FLOPs, and the bytes of both factors and the result."""
        width = self.precision.computed
        moved = width * (rows * (inputs + outputs) + copies * inputs * outputs)
        flops = 2 * rows * inputs * outputs
        return flops / (self.flops_per_s * self.rates.matrices) + moved / self.bytes_per_s

    def _attention(self, shape: ModelShape) -> float:
        """Seconds of a layer's scores and their weighted sum; a causal one skips half of them."""
        recipe = self.plan.recipe
        seen = min(self.length, shape.window or self.length)
        pairs = self.tokens * seen * (1 + shape.crosses)
        is_eager = recipe.model.attention == "eager"
        is_causal = recipe.data.facts.is_shifted and not shape.patches
        flops = 2.0 * pairs * shape.heads * (shape.head_dim + shape.value_dim)
        if is_causal and not is_eager:
            flops /= 2
        share = self.rates.matrices if is_eager else self.rates.attention
        seconds = flops / (self.flops_per_s * share)
        if is_eager:
            seconds += _SCORE_BYTES * pairs * shape.heads / self.bytes_per_s
        return seconds

    def _bytes_per_token(self, shape: ModelShape) -> float:
        """Bytes that a layer's elementwise operations read and write for a token in the forward, eagerly."""
        width, is_mixed = self.precision.computed, self.precision.autocast is not None
        is_wide = is_mixed and not self.is_sharded  # the residual stream is of fp32
        hidden, structure = shape.hidden, shape.structure
        is_decoder = shape.family == "decoder"
        norms = structure.norms if is_decoder else 2 + shape.crosses
        has_rms = (is_decoder and structure.norm.startswith("rms")) or shape.family == "t5"
        per_norm = _RMS_BYTES if has_rms else (4 + width + 8 if is_wide else 2 * width)
        moved = norms * per_norm * hidden
        if is_decoder and structure.rotary != "none":
            moved += _ROTARY_BYTES * (shape.query_width + shape.kv_width)
        if is_decoder and structure.qk_norm:
            moved += _RMS_BYTES * (shape.query_width + shape.kv_width)
        moved += 2 * (width + 8 if is_wide else 3 * width) * hidden
        if shape.dropout:
            moved += 3 * (2 * width + 1) * hidden
        return moved + self._activation_bytes(shape, is_wide)

    def _activation_bytes(self, shape: ModelShape, is_wide: bool) -> float:
        width = self.precision.computed
        columns = shape.ffn * max(1, shape.top_k) + shape.shared_experts
        is_gated = shape.family == "decoder" and shape.structure.feed_forward != "plain"
        if is_gated:
            return 5 * width * columns
        if shape.activation == "gelu_new":
            return (_NEW_GELU_BYTES_WIDE if is_wide else 18 * width) * columns
        return 2 * width * columns

    def _casts(self) -> float:
        """Seconds of casting weights to 16 bits and gradients back, and of unpacking quantised weights."""
        moved = 0.0
        if self.precision.autocast and not self.is_sharded:
            moved += 6 * self.shape.parameters + 6 * self.trained
        if self.plan.recipe.model.quantization != "none":
            moved += 2 * 2.5 * self.shape.parameters
        return moved / self.bytes_per_s

    def _loss(self) -> float:
        """Seconds of the language model's head and its logits."""
        if self.shape.classes is not None:
            return 0.0
        vocabulary, hidden = self.shape.vocabulary, self.shape.hidden
        passes = self.passes + bool(self.plan.recipe.loss.chunked)
        logits = self.tokens * vocabulary * self.rates.logit_bytes / self.bytes_per_s
        return passes * self._product(self.tokens, hidden, vocabulary) + logits

    def launches(self) -> float:
        """Seconds that the host takes to launch a micro-batch's kernels."""
        return self._launch() * self.shape.layers * (3 + self.repeats_layers)

    def _launch(self) -> float:
        """Seconds to launch a layer's forward."""
        return self.rates.launch_s * (_COMPILED_LAUNCHES if self.is_compiled else 1)

    def collectives(self) -> tuple[float, float]:
        """Seconds of a micro-batch's collectives, and of those once a step (Rajbhandari et al. 2020, §7)."""
        strategy, mesh = self.plan.recipe.strategy, self.plan.mesh
        wide, trained, name = self.precision.stored, self.trained, strategy.name
        if mesh.ranks == 1:
            return 0.0, 0.0
        micro = step = 0.0
        if self.is_sharded:
            gathers = 3 if name == "zero3" else 2 if strategy.reshard == "forward" else 1
            gathered, reduced = (
                gathers * self._gather(),
                wide * trained * self._inside() / self._rate(),
            )
            if mesh.replicas > 1:
                step = 2 * wide * trained / mesh.shards / self._between_nodes()
            if strategy.reshard == "step":
                step, gathered = step + gathered, 0.0
            if strategy.reduce == "step":
                step, reduced = step + reduced, 0.0
            return gathered + reduced, step
        micro = wide * trained / self._rate() if name == "zero2" else 0.0
        times = 1 if name == "zero2" else 2
        return micro, times * wide * trained / self._rate()

    def _gather(self) -> float:
        """Seconds to gather all weights once, in the dtype of the forward."""
        if not self.is_sharded or self.plan.mesh.ranks == 1:
            return 0.0
        return self.precision.computed * self.shape.parameters * self._inside() / self._rate()

    def _inside(self) -> float:
        """Share of a gathered tensor that comes from other ranks."""
        shards = self.plan.mesh.shards
        is_fsdp = self.plan.recipe.strategy.name == "fsdp" and shards > 1
        return (shards - 1) / shards if is_fsdp else 1.0

    def _rate(self) -> float:
        """Bytes per second of the collectives that shard weights and gradients, or all-reduce them."""
        mesh = self.plan.mesh
        is_alone = mesh.shards <= mesh.ranks_per_node if self.is_sharded else mesh.nodes == 1
        return self._within_a_node() if is_alone else self._between_nodes()

    def _within_a_node(self) -> float:
        if self.plan.site.within:
            return 1e9 * self.plan.site.within
        return (self.gpu.link or 12e9) * self.rates.link

    def _between_nodes(self) -> float:
        """Bytes per second of a ring over nodes, whose GPUs all have a network card."""
        if self.plan.site.between:
            return 1e9 * self.plan.site.between
        link = self.gpu.link or 12e9
        network = next(rate for least, rate in _NETWORKS if link >= least)
        together = network * self.plan.mesh.ranks_per_node * self.rates.network
        return min(self._within_a_node(), together)

    def latency(self) -> float:
        """Seconds of waiting for the first byte in a micro-batch's collectives."""
        ranks = self.plan.mesh.ranks
        if ranks == 1 or not self.is_sharded:
            return 0.0
        return self.rates.latency_s * self.shape.layers * math.log2(ranks)

    def update(self) -> float:
        """Seconds of clipping and of the optimizer, whose states may be in the host's memory."""
        mesh = self.plan.mesh
        parts = mesh.shards if self.is_sharded else mesh.ranks
        own = self.trained / (1 if self.plan.recipe.strategy.name == "ddp" else parts)
        is_on_host = self.plan.recipe.strategy.offload != "none"
        rate = copy_rate(self.plan) if is_on_host else self.bytes_per_s
        return own * self.rates.update_bytes / rate

    def offload(self) -> float:
        """Seconds of moving states and activations to the host's memory and back."""
        recipe, batch = self.plan.recipe, self.plan.batch
        moved = 0.0
        if recipe.strategy.offload != "none":
            moved += 4.0 * self.trained * self.precision.stored / batch.gpus
        if recipe.model.activation_offload:
            kept = self.tokens * self.shape.hidden * self.precision.computed
            moved += 2 * batch.accumulation * self.shape.layers * kept
        return moved / copy_rate(self.plan)


_SCORE_BYTES = 24
"""Of a score in eager attention: mask, softmax in fp32, and casts."""
_RMS_BYTES = 32
"""Of a number in transformers' RMSNorm: cast, square, mean, product, cast back, times the weight."""
_ROTARY_BYTES = 24
"""Of a rotated number: two products, a sum, and the turned copy."""
_NEW_GELU_BYTES_WIDE = 60
"""Of a number in transformers' gelu_new under autocast, eight operations of which most are in fp32."""


def _padded_length(plan: Plan, shape: ModelShape, in_batch: int) -> float:
    """Tokens of a row with its padding, in a micro-batch of rows drawn at random."""
    if shape.patches:
        return shape.tokens(None)
    if plan.data.row_lengths and plan.steps.tokens_per_step:
        rows = plan.batch.effective * plan.recipe.objective.facts.sequences
        mean = plan.steps.tokens_per_step / rows
        return mean / (1 - (plan.data.padding(in_batch) or 0.0))
    return float(plan.recipe.data.sequence_length or plan.data.row_tokens or 1)
