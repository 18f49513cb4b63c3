"""Corrections of memory estimates, fitted to runs that logged predicted and measured peaks. Pure.

A table has one row per kind of GPU and strategy: the ratios of measured to predicted allocated and
reserved bytes, and the bytes that the device used beyond the reserved ones. It can be edited by hand.
Plans for a GPU and strategy without a row are not changed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from drumline.errors import DataError
from drumline.memory.ranges import ByteRange, Device, Totals

TABLE_VERSION = 1
TOTALS = ("allocated", "reserved", "device")


@dataclass(frozen=True)
class Pair:
    """Predicted and measured peak bytes of one attempt, keyed by the names in TOTALS.

    `time`: measured over planned seconds of a step; None where the attempt did not log both.
    """

    run: str
    gpu: str
    strategy: str
    predicted: dict[str, int]
    measured: dict[str, int]
    time: float | None = None


@dataclass(frozen=True)
class Row:
    """Measured over predicted bytes, for one kind of GPU and one strategy.

    `runs` is the number of runs. `allocated` and `reserved` are [smallest, median, largest] ratios.
    `outside`: device bytes beyond the reserved ones (CUDA context, NCCL), [smallest, median, largest].
    `time`: measured over planned seconds of a step, the same three; None where no run logged both.
    """

    gpu: str
    strategy: str
    runs: int
    allocated: list[float]
    reserved: list[float]
    outside: list[int]
    time: list[float] | None = None

    def applied_to(self, device: Device) -> Device:
        """The device with what these runs measured, so that a replay keeps to what is left for it."""
        return replace(device, measured_outside=_three(self.outside), held=_three(self.reserved))

    def correct(self, totals: Totals) -> Totals:
        """Totals corrected by this row, whose replay was with the device that `applied_to` returns."""
        reserved = _times(totals.reserved, self.reserved)
        device = ByteRange(*(
            size + more
            for size, more in zip((reserved.low, reserved.expected, reserved.high), self.outside, strict=True)
        ))  # fmt: skip
        words = f"corrected by {self.runs} runs on {self.gpu}, {self.strategy}"
        basis = {name: f"{text}; {words}" for name, text in totals.basis.items()}
        return Totals(_times(totals.allocated, self.allocated), reserved, device, basis)


@dataclass(frozen=True)
class Calibration:
    """A calibration table: at most one row per kind of GPU and strategy."""

    rows: tuple[Row, ...] = ()

    def row(self, gpu: str, strategy: str) -> Row | None:
        """The row of this kind of GPU and strategy, or None."""
        return next((r for r in self.rows if (r.gpu, r.strategy) == (gpu, strategy)), None)

    def to_plain(self) -> dict[str, Any]:
        """The table as a JSON object; `from_plain` reads it."""
        return {"calibration": TABLE_VERSION, "rows": [asdict(row) for row in self.rows]}


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = values
    return low, median, high


def _times(three: ByteRange, factors: Sequence[float]) -> ByteRange:
    """Scale by the median ratio; low and high are widened to cover the smallest and largest ratio."""
    low, median, high = factors
    expected = three.expected * median
    return ByteRange(
        int(min(three.low * median, three.expected * low)),
        int(expected),
        int(max(three.high * median, three.expected * high)),
    )


def fit(pairs: Sequence[Pair]) -> Calibration:
    """The calibration table of these pairs, grouped by kind of GPU and strategy."""
    kinds = sorted({(pair.gpu, pair.strategy) for pair in pairs})
    return Calibration(tuple(_row(gpu, strategy, pairs) for gpu, strategy in kinds))


def _row(gpu: str, strategy: str, pairs: Sequence[Pair]) -> Row:
    import statistics  # imported here to keep a dry run fast

    mine = [pair for pair in pairs if (pair.gpu, pair.strategy) == (gpu, strategy)]
    factors = {
        name: [pair.measured[name] / pair.predicted[name] for pair in mine]
        for name in ("allocated", "reserved")
    }
    outside = [pair.measured["device"] - pair.measured["reserved"] for pair in mine]
    spread = {
        name: [round(v, 4) for v in (min(values), statistics.median(values), max(values))]
        for name, values in factors.items()
    }
    extra = [min(outside), int(statistics.median(outside)), max(outside)]
    ratios = [pair.time for pair in mine if pair.time]
    time = (
        [round(v, 4) for v in (min(ratios), statistics.median(ratios), max(ratios))]
        if ratios
        else None
    )
    return Row(gpu, strategy, len(mine), spread["allocated"], spread["reserved"], extra, time)


def errors(pairs: Sequence[Pair], calibration: Calibration) -> dict[str, list[float]]:
    """Relative errors after correction, predicted / measured - 1: for each total, one value per pair."""
    result: dict[str, list[float]] = {name: [] for name in TOTALS}
    for pair in pairs:
        row = calibration.row(pair.gpu, pair.strategy)
        predicted = dict(pair.predicted)
        if row:
            predicted["allocated"] = int(predicted["allocated"] * row.allocated[1])
            predicted["reserved"] = int(predicted["reserved"] * row.reserved[1])
            predicted["device"] = predicted["reserved"] + row.outside[1]
        for name in TOTALS:
            result[name].append(predicted[name] / pair.measured[name] - 1)
    return result


def errors_left_out(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Leave-one-out errors: each pair is corrected by a table fitted to the other pairs."""
    result: dict[str, list[float]] = {name: [] for name in TOTALS}
    for left_out in pairs:
        others = [pair for pair in pairs if pair is not left_out]
        for name, values in errors([left_out], fit(others)).items():
            result[name] += values
    return result


def from_plain(plain: Any, where: str) -> Calibration:
    """Read a table from its JSON object; raises DataError if it is invalid. `where` names the file."""
    if not isinstance(plain, dict) or plain.get("calibration") != TABLE_VERSION:
        raise DataError(f"{where}: not a calibration table of version {TABLE_VERSION}")
    try:
        return Calibration(tuple(Row(**row) for row in plain["rows"]))
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: {error}") from None
