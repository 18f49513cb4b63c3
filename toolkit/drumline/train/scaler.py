"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018): halve on overflow, double after 2,000 good steps.

torch's GradScaler is not used because it detects overflow on each rank separately; here the norm of the
whole gradient, equal on all ranks, decides.
"""

from dataclasses import dataclass

GROWTH_INTERVAL = 2000


@dataclass
class LossScaler:
    """The loss scale; `good_steps` since it last changed; `overflows` in the whole run."""

    scale: float = 65536.0
    good_steps: int = 0
    overflows: int = 0

    def update(self, overflow: bool) -> None:
        """Halve the scale on an overflow; double it after `GROWTH_INTERVAL` steps without one."""
        if overflow:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            self.overflows += 1
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0
