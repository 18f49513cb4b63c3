"""A recording of all allocations and frees of a traced run, and the peaks derived from it. Pure."""

from dataclasses import dataclass, field

from drumline.memory.events import FREE, ROUND, Event


@dataclass(frozen=True)
class Birth:
    """The origin of a block: the phase, the operator, and the tensor's shape and dtype."""

    phase: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Recording:
    """All allocations and frees in order, in the form that the allocator model replays.

    `births` is indexed by block number. `phases` are (index of the first event, name), in order. `parts`
    maps block numbers to a part (parameters, gradients, …) where that is known. Blocks whose last dimension
    equals `vocabulary` are counted under the loss.
    """

    events: list[Event] = field(default_factory=list)
    births: list[Birth] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)
    vocabulary: int | None = None

    def peak(self, round_to: int = ROUND) -> "RecordedPeak":
        """The peak of live bytes, each block rounded up to a multiple of `round_to` bytes."""
        sizes: dict[int, int] = {}
        total = most = 0
        where = -1
        for index, (number, size, _) in enumerate(self.events):
            if size == FREE:
                total -= sizes.pop(number)
            else:
                sizes[number] = -(-size // round_to) * round_to
                total += sizes[number]
                if total > most:
                    most, where = total, index
        return RecordedPeak(most, self._phase_at(where), self._alive_at(where, round_to))

    def peaks_by_phase(self, round_to: int = ROUND) -> dict[str, int]:
        """The peak of live bytes in each phase, by phase name."""
        sizes: dict[int, int] = {}
        result: dict[str, int] = {}
        total = 0
        starts = iter([*self.phases, (len(self.events) + 1, "")])
        _, name = next(starts)
        upcoming = next(starts)
        for index, (number, size, _) in enumerate(self.events):
            while index >= upcoming[0]:
                name, upcoming = upcoming[1], next(starts)
            total -= sizes.pop(number) if size == FREE else 0
            if size != FREE:
                sizes[number] = -(-size // round_to) * round_to
                total += sizes[number]
            result[name] = max(result.get(name, 0), total)
        return result

    def traced(self) -> "Traced":
        """What a plan needs of it."""
        peak = self.peak()
        parts: dict[str, int] = {}
        for number, size in peak.alive.items():
            part = self.part_of(number)
            parts[part] = parts.get(part, 0) + size
        return Traced(peak.bytes, peak.phase, parts, self.peaks_by_phase(), self.events)

    def part_of(self, number: int) -> str:
        """The part of the plan's memory breakdown that a block belongs to."""
        if number in self.parts:
            return self.parts[number]
        birth = self.births[number]
        flat_buffer = birth.operator == "aten.empty.memory_format" and len(birth.shape) == 1
        if flat_buffer or birth.operator in ("resize_", "parameters"):  # buffers of FSDP2 and DDP
            return "communication"
        if self.vocabulary and birth.shape[-1:] == (self.vocabulary,):
            return "loss"
        return "activations"

    def _phase_at(self, index: int) -> str:
        names = [name for start, name in self.phases if start <= index]
        return names[-1] if names else ""

    def _alive_at(self, index: int, round_to: int) -> dict[int, int]:
        alive: dict[int, int] = {}
        for number, size, _ in self.events[: index + 1]:
            if size == FREE:
                del alive[number]
            else:
                alive[number] = -(-size // round_to) * round_to
        return alive


@dataclass(frozen=True)
class Traced:
    """What a plan needs of a recording: the peak of live bytes, its phase and parts, and all events.

    `phases`: the peak of live bytes in each phase.
    """

    peak: int
    phase: str
    parts: dict[str, int]
    phases: dict[str, int]
    events: list[Event]


@dataclass(frozen=True)
class RecordedPeak:
    """Live bytes at the peak, its phase, and the bytes of each block alive then, by block number."""

    bytes: int
    phase: str
    alive: dict[int, int]
