"""`drumline plan --best`: the fastest splits that fit, for one or several numbers of GPUs."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from drumline.errors import PlanError
from drumline.plan.advise import Change, change_words
from drumline.plan.fastest import Search, search
from drumline.plan.model import NO_SITE, Plan, SiteFacts
from drumline.recipe.schema import Recipe
from drumline.session.planning import make_plan, world_of
from drumline.units import format_bytes, format_duration, format_number

_SHOWN = 5
_SHOWN_LOST = 5


@dataclasses.dataclass(frozen=True)
class Best:
    """What was found for one number of GPUs; `base`: the plan whose splits were searched."""

    stated: Recipe
    base: Plan
    search: Search

    def whole(self, change: Change) -> Change:
        """The change with the GPUs that it is for, so that its overrides can stand behind the recipe."""
        moved = self.base.recipe.cluster
        cluster = {
            key: getattr(moved, key)
            for key in ("gpu", "nodes", "gpus_per_node")
            if getattr(moved, key) != getattr(self.stated.cluster, key)
        }
        batch = {"gpus": self.base.batch.gpus, **change["batch"]}
        return {**change, "batch": batch, **({"cluster": cluster} if cluster else {})}


def find_best(
    recipe: Recipe, gpus: Sequence[int | None], gpu: str | None, site: SiteFacts = NO_SITE
) -> list[Best]:
    """The fastest splits for each number of GPUs (None: as the recipe says).

    A number that cannot make the batch is left out, and told; PlanError where none can, or where memory or
    time is not known.
    """
    found, refused = [], []
    for count in gpus:
        try:
            base = make_plan(recipe, count, gpu, site=site)
        except PlanError as error:
            if len(gpus) == 1:
                raise
            refused.append(f"{count} GPUs: {error}")
            continue
        result = None if base.time is None else search(base, world_of(base), _SHOWN)
        if result is None:
            is_known = base.memory.device is not None
            why = "no time is estimated on a CPU" if is_known else base.memory.why
            raise PlanError(f"--best: {why}. Nearest: a cluster.gpu of the table, a model by name")
        found.append(Best(recipe, base, result))
    if not found:
        raise PlanError("; ".join(refused))
    for text in refused:
        print(f"left out: {text}", file=sys.stderr)
    return found


def best_table(found: Sequence[Best], recipe: str) -> str:
    """The fastest splits, why faster ones lost, and the command that takes the first one."""
    many = len(found) > 1
    lines = ["The fastest that fit, of the same training:", ""]
    price = found[0].base.site.gpu_hour_price
    cost = f"{'cost':>9}" if price else ""
    lines.append(f"  {'GPUs':>5}{'s a step':>10}{'tokens/s':>12}{'MFU':>6}{'whole run':>15}{'GPU-hours':>11}"
                 f"{cost}{'memory':>11}  what changes")  # fmt: skip
    for best in found:
        for change, plan in best.search.found[: 1 if many else _SHOWN]:
            lines.append(_row(plan, best.base.recipe, change))
        if not best.search.found:
            lines.append(
                f"  {best.base.batch.gpus:>5}  nothing that is known fits these GPUs for sure"
            )
    if not many:
        lines += _lost(found[0])
    if pick := _pick(found):
        words = change_words(pick)
        lines += ["", f"take the first: drumline run {shlex.quote(recipe)} {words}"]
    return "\n".join(lines)


def best_facts(found: Sequence[Best]) -> dict[str, Any]:
    """The same as an object for `--json`."""
    return {
        "best": [
            {
                "gpus": best.base.batch.gpus,
                "found": [
                    {
                        "overrides": change_words(best.whole(change)).split(" "),
                        "time": dataclasses.asdict(plan.time) if plan.time else None,
                        "device_high": plan.memory.device.high if plan.memory.device else None,
                        "cost": plan.time.cost if plan.time else None,
                    }
                    for change, plan in best.search.found
                ],
                "lost": [
                    {"overrides": change_words(one.change).split(" "), "why": one.why}
                    for one in best.search.lost
                ],
                "slower": best.search.slower,
            }
            for best in found
        ]
    }


def _row(plan: Plan, recipe: Recipe, change: Change) -> str:
    time, device = plan.time, plan.memory.device
    assert time and device
    tokens = f"{time.tokens_per_s:,.0f}" if time.tokens_per_s else "-"
    mfu = f"{time.mfu:.0%}" if time.mfu else "-"
    cost = f"{time.cost:>9,.0f}" if time.cost is not None else ""
    words = change_words(_differing(recipe, change)) or "nothing"
    return (
        f"  {plan.batch.gpus:>5}{time.step_s.expected:>10.3g}{tokens:>12}{mfu:>6}"
        f"{format_duration(3600 * time.hours.expected):>15}{format_number(time.gpu_hours):>11}{cost}"
        f"{format_bytes(device.high):>11}  {words}"
    )


def _lost(best: Best) -> list[str]:
    """Faster splits that lost, and how many were not looked at."""
    lines = ["", "faster, but lost:"] if best.search.lost else []
    shown = best.search.lost[:_SHOWN_LOST]
    for one in shown:
        words = change_words(_differing(best.base.recipe, one.change)) or "as it is"
        lines.append(f"  {words}\n    {one.why}")
    if more := len(best.search.lost) - len(shown):
        lines.append(f"  and {more:,} more")
    if best.search.slower:
        lines += ["", f"{best.search.slower:,} others are slower by estimate"]
    return lines


def _pick(found: Sequence[Best]) -> Change | None:
    """The change that makes the first of all, whole."""
    fitting = [best for best in found if best.search.found]
    if not fitting:
        return None
    best = min(fitting, key=lambda one: _hours(one.search.found[0][1]))
    return best.whole(best.search.found[0][0])


def _hours(plan: Plan) -> float:
    assert plan.time
    return plan.time.hours.expected


def _differing(recipe: Recipe, change: Change) -> Change:
    """The keys of a change whose values the recipe does not have."""
    kept = {
        section: {
            key: value
            for key, value in values.items()
            if getattr(getattr(recipe, section), key) != value
        }
        for section, values in change.items()
    }
    return {section: values for section, values in kept.items() if values}
