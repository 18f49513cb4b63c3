"""DeepSpeed's ZeRO on a ledger: partitions, gradient buckets and gathered weights of release 0.19.8.

Follows its source (stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py) under the configuration in
`plan/deepspeed.py`. `tests/distributed/test_zero_memory.py` compares it with the live tensors of real ranks.

A model's weights have `model` bytes per element, 2 for bf16; masters and optimizer state have `stored` ones,
4. A complete gradient moves into a bucket at once, so that in stages 1 and 2 the whole model's gradients
exist only while stage 1 accumulates them. A full bucket is flattened into another buffer and reduced; the
rank's part goes to its partition.
"""

import math

from drumline.architectures.trained import held_parameters, trained_parameters, weights_of
from drumline.memory.ledger import Block, Ledger, Parameter
from drumline.memory.load import Load

_PART = "communication"
_FP32, _FP64 = 4, 8


class Zero:
    """What ZeRO holds on a rank, and what it allocates in backward and step; not used by other strategies."""

    def __init__(self, ledger: Ledger, load: Load) -> None:
        self._ledger, self._load, self._sizes = ledger, load, load.zero
        self._stage = int(load.strategy[-1])
        self._model, self._stored = load.numbers.model_bytes, load.numbers.stored
        self._sent = load.numbers.autocast_bytes or self._model
        """Bytes per element of what ranks exchange of matrices."""
        self._part = partition(load)
        is_wide = load.numbers.has_masters and accumulates_in_fp32(
            self._stage, load.accumulation, load.offload
        )
        self._sums = _FP32 if is_wide else self._model
        """Bytes per element in which this rank's partition of the gradients is summed."""
        self._is_compact = self._stage == 2 and self._sums > self._model
        self._held: list[Block] = []
        self._buckets: list[Block] = []
        self._partitions: list[Block] = []
        self._fill = 0.0

    def hold_state(self) -> None:
        """Allocate what lives for the whole attempt: weights, masters, optimizer state, stage 3's buffers."""
        ledger, load = self._ledger, self._load
        weights = self._part if self._stage == 3 else trained_parameters(load.shape)
        self._held.append(ledger.block(weights, self._model, "parameters"))
        frozen = partition(load, is_frozen=True)
        if frozen:
            self._held.append(ledger.block(frozen, load.frozen_width, "parameters"))
        if not load.offload:
            for _ in range(1 + len(load.optimizer_states)):
                self._held.append(ledger.block(self._part, self._stored, "optimizer"))
        if self._stage == 3:
            self._held += self._new_buckets()
            if not load.offload:
                self._held.append(ledger.block(self._part, self._sums, "gradients"))

    def start_micro_batch(self, parameters: list[Parameter]) -> list[Block]:
        """Allocate what earlier micro-batches left, and what stage 3 gathers; the latter is returned."""
        ledger, load = self._ledger, self._load
        parameters = [parameter for parameter in parameters if not parameter.is_frozen]
        for parameter in parameters:
            parameter.on_ready = lambda parameter=parameter: self._take(parameter)
        if load.accumulation > 1 and self._stage == 1:
            self._buckets = self._new_buckets()
            for parameter in parameters:
                parameter.gradient = ledger.block(parameter.elements, self._model, "gradients")
        elif load.accumulation > 1 and self._stage == 2:
            self._hold_partition()
        if self._stage < 3:
            return []
        whole, prefetched = gathered(load)
        return [
            ledger.block(whole, self._model, _PART),
            ledger.block(prefetched, self._sent, _PART),
        ]

    def finish_backward(self) -> None:
        """Reduce the last bucket; stages 1 and 2 then release their buckets."""
        self._flush(self._fill)
        self._fill = 0.0
        self._buckets.clear()
        del self._partitions[1:]

    def step(self, has_scratch: bool) -> None:
        """The optimizer's update of this rank's partition, in stage 3 of one sub-group at a time."""
        ledger, load = self._ledger, self._load
        if load.offload:
            self._partitions.clear()
            return
        elements = min(self._part, self._sizes.sub_group) if self._stage == 3 else self._part
        whole = ledger.block(persistent(load), self._model, _PART) if self._stage == 3 else None
        if self._stage < 3:  # the norm of each gradient, in double precision
            norm = ledger.block(min(largest(load), self._part), _FP64, "activations")
            del norm
        gradient = None
        if not self._is_compact:
            gradient = ledger.block(elements, self._sums, "gradients")
            if self._sums < _FP32:
                gradient = ledger.block(elements, _FP32, "gradients")
            self._partitions.clear()
        scratch = ledger.block(elements, self._stored, "optimizer") if has_scratch else None
        del gradient, scratch, whole
        self._partitions.clear()

    def _new_buckets(self) -> list[Block]:
        """The buffers that gradients are collected in; under autocast one set for each reduced dtype.

        Stages 1 and 2 have two of each, so that one is filled while the other is reduced.
        """
        sizes, autocast = self._sizes, self._load.numbers.autocast_bytes
        if self._stage == 3:
            widths = [self._model, autocast] if autocast else [self._model]
        else:
            widths = [self._model] * (4 if autocast else 2)
        return [self._ledger.block(sizes.bucket, width, _PART) for width in widths]

    def _take(self, parameter: Parameter) -> None:
        """Move a complete gradient into the bucket; a full bucket is reduced first."""
        if self._stage < 3 and not self._buckets:
            self._buckets = self._new_buckets()
        size = parameter.elements
        if self._fill + size > self._sizes.bucket:
            self._flush(self._fill)
            self._fill = 0.0
        if (
            size > self._sizes.bucket
        ):  # goes past the bucket, or stands for the weights of many layers
            self._flush(min(size, max(self._sizes.bucket, largest(self._load))))
        else:
            self._fill += size
        parameter.gradient = None

    def _flush(self, elements: float) -> None:
        """Reduce a bucket: its content is flattened, and this rank's part goes to the partition."""
        if not elements:
            return
        ledger, load = self._ledger, self._load
        if self._is_compact:
            self._hold_partition()
        flat = [ledger.block(elements, self._model, _PART)]
        if self._sent < self._model:
            flat.append(ledger.block(elements, self._sent, _PART))
        if self._stage == 3:
            mine = ledger.block(elements / load.shard_ranks, self._sums, _PART)
            del mine
        elif self._is_compact:
            wide = ledger.block(min(largest(load), self._part), _FP32, _PART)
            del wide
        del flat
        self._hold_partition()

    def _hold_partition(self) -> None:
        """Allocate this rank's partition of the gradients, unless it exists.

        Stage 2 that sums in the model's dtype has a second one from the second micro-batch on.
        """
        if self._stage == 3 or self._load.offload:
            return
        several = self._stage == 2 and self._load.accumulation > 1 and not self._is_compact
        if len(self._partitions) < 1 + several:
            self._partitions.append(self._ledger.block(self._part, self._sums, "gradients"))


def accumulates_in_fp32(stage: int, accumulation: int, offload: bool) -> bool:
    """Whether the gradients of 16-bit weights are summed in fp32 by ZeRO of this stage.

    Stage 2: always, since its step needs the fp32 sum anyway; but not with offload, where DeepSpeed 0.19.8
    then returns gradients of earlier steps. Stage 3: if there is something to sum. Stage 1 accumulates the
    whole model's gradients, in bf16 as DeepSpeed does by default.
    """
    return (stage == 2 and not offload) or (stage == 3 and accumulation > 1)


def partition(load: Load, is_frozen: bool = False) -> int:
    """Elements of a rank's partition of the trained weights, or of what it holds of the frozen ones.

    Stage 3 divides each weight by itself; before, frozen weights are whole on every rank.
    """
    shape = load.shape
    if load.strategy != "zero3":
        trained = trained_parameters(shape)
        return held_parameters(shape) - trained if is_frozen else -(-trained // load.shard_ranks)
    return sum(
        run.number * -(-math.prod(sizes) // load.shard_ranks)
        for run in weights_of(shape, is_frozen)
        for sizes in run.tensors.values()
    )


def persistent(load: Load) -> int:
    """Elements of the trained weights that stage 3 keeps whole, because each of them is small."""
    return sum(
        run.number * math.prod(sizes)
        for run in weights_of(load.shape, is_frozen=False)
        for sizes in run.tensors.values()
        if math.prod(sizes) <= load.zero.persistent
    )


def largest(load: Load) -> int:
    """Elements of the largest trained weight."""
    return max(
        math.prod(sizes)
        for run in weights_of(load.shape, is_frozen=False)
        for sizes in run.tensors.values()
    )


def gathered(load: Load) -> tuple[int, int]:
    """Elements of stage 3's whole weights, and of the buffer that prefetched ones are gathered into.

    Weights stay whole if they are used again within `live` elements of the recorded order: forward and
    backward each count once, and recomputation once more, so that the last layers stay.
    """
    sizes, whole = load.zero, load.shape.parameters
    reused = sizes.live // (2 if load.checkpointing == "none" else 3)
    prefetched = min(whole, sizes.prefetch)
    return max(min(whole, reused + prefetched), largest(load)), prefetched
