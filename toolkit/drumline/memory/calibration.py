"""Corrections learnt from runs that logged their real peaks beside the prediction. Pure.

A table has a row for every kind of GPU and strategy: by what factor allocated and reserved bytes
came out, and how many bytes the device used beyond what was reserved. It is small, can be read and
edited by people, and changes a plan only where it has a row.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drumline.errors import DataError
from drumline.memory.ranges import ByteRange, Totals

TABLE_VERSION = 1
TOTALS = ("allocated", "reserved", "device")


@dataclass(frozen=True)
class Pair:
    """What one attempt was predicted to need and what it did: bytes by total."""

    run: str
    gpu: str
    strategy: str
    predicted: dict[str, int]
    measured: dict[str, int]


@dataclass(frozen=True)
class Row:
    """Factors on predicted bytes: the smallest, the median and the largest seen in so many runs.

    `outside` are bytes of the device beyond the reserved ones (context, NCCL): low, median, high.
    """

    gpu: str
    strategy: str
    runs: int
    allocated: list[float]
    reserved: list[float]
    outside: list[int]


@dataclass(frozen=True)
class Calibration:
    """The table."""

    rows: tuple[Row, ...] = ()

    def row(self, gpu: str, strategy: str) -> Row | None:
        """The row of that kind of GPU and strategy."""
        return next((r for r in self.rows if (r.gpu, r.strategy) == (gpu, strategy)), None)

    def correct(self, totals: Totals, gpu: str, strategy: str) -> Totals:
        """Totals with the row's factors; as they are where there is none."""
        row = self.row(gpu, strategy)
        if row is None:
            return totals
        reserved = _times(totals.reserved, row.reserved)
        device = ByteRange(*(
            size + more
            for size, more in zip((reserved.low, reserved.expected, reserved.high), row.outside, strict=True)
        ))  # fmt: skip
        words = f"corrected by {row.runs} runs on {gpu}, {strategy}"
        basis = {name: f"{text}; {words}" for name, text in totals.basis.items()}
        return Totals(_times(totals.allocated, row.allocated), reserved, device, basis)

    def to_plain(self) -> dict[str, Any]:
        """As written to a file."""
        return {"calibration": TABLE_VERSION, "rows": [asdict(row) for row in self.rows]}


def _times(three: ByteRange, factors: Sequence[float]) -> ByteRange:
    """The expected value by the median factor; low and high at least as far out as was seen."""
    low, median, high = factors
    expected = three.expected * median
    return ByteRange(
        int(min(three.low * median, three.expected * low)),
        int(expected),
        int(max(three.high * median, three.expected * high)),
    )


def fit(pairs: Sequence[Pair]) -> Calibration:
    """The table that makes the median error of every kind of GPU and strategy zero."""
    kinds = sorted({(pair.gpu, pair.strategy) for pair in pairs})
    return Calibration(tuple(_row(gpu, strategy, pairs) for gpu, strategy in kinds))


def _row(gpu: str, strategy: str, pairs: Sequence[Pair]) -> Row:
    import statistics  # not on the path of a dry run

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
    return Row(gpu, strategy, len(mine), spread["allocated"], spread["reserved"], extra)


def errors(pairs: Sequence[Pair], calibration: Calibration) -> dict[str, list[float]]:
    """Predicted over measured, less one, of every pair and total, after correction."""
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
    """The same, each pair corrected by a table that was made without it: what a new run can expect."""
    result: dict[str, list[float]] = {name: [] for name in TOTALS}
    for left_out in pairs:
        others = [pair for pair in pairs if pair is not left_out]
        for name, values in errors([left_out], fit(others)).items():
            result[name] += values
    return result


def from_plain(plain: Any, where: str) -> Calibration:
    """A table as read from a file; DataError where it is none."""
    if not isinstance(plain, dict) or plain.get("calibration") != TABLE_VERSION:
        raise DataError(f"{where}: not a calibration table of version {TABLE_VERSION}")
    try:
        return Calibration(tuple(Row(**row) for row in plain["rows"]))
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: {error}") from None
