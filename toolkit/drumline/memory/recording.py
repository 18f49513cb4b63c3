"""What a recorder saw: every allocation and its end, and what follows from them. Pure."""

from dataclasses import dataclass, field

from drumline.memory.allocator import FREE, Event
from drumline.memory.ledger import ROUND


@dataclass(frozen=True)
class Birth:
    """Where a block came from: the phase of the program, the operator, and what it held."""

    phase: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Recording:
    """Every allocation and its end, as the allocator model replays them.

    `births` is by block number; `phases` are (index of the first event, name), in order; `parts`
    names what a block holds where that is known (parameters, gradients, …); blocks whose rows are as
    long as the `vocabulary` are the loss's.
    """

    events: list[Event] = field(default_factory=list)
    births: list[Birth] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)
    vocabulary: int | None = None

    def peak(self, round_to: int = ROUND) -> "RecordedPeak":
        """The moment when most bytes are alive, each block rounded up to `round_to`."""
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
        """The most bytes alive in each phase."""
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

    def part_of(self, number: int) -> str:
        """Which part of the plan's breakdown a block belongs to."""
        if number in self.parts:
            return self.parts[number]
        birth = self.births[number]
        flat_buffer = birth.operator == "aten.empty.memory_format" and len(birth.shape) == 1
        if flat_buffer or birth.operator in ("resize_", "parameters"):  # FSDP2's, and DDP's buckets
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
class RecordedPeak:
    """Bytes alive at the peak, the phase it is in, and the bytes of each block alive there."""

    bytes: int
    phase: str
    alive: dict[int, int]
