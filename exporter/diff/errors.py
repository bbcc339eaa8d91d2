"""How far values lie from what they should be, summed up call by call, and how far they may."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from runtimes.tolerances import FLOOR_ULPS, MACHINE_EPSILON, MAX_MULTIPLE, RMS_MULTIPLE


@dataclass
class Sum:
    """Largest absolute value, and root of the mean square, of all numbers that were added."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, numbers: Tensor) -> None:
        """Numbers of any shape, float64; one that is not finite counts as infinite."""
        if not numbers.numel():
            return
        finite = bool(torch.isfinite(numbers).all())
        self.largest = max(self.largest, float(numbers.abs().max()) if finite else float("inf"))
        self.squares += float(numbers.square().sum()) if finite else float("inf")
        self.count += numbers.numel()

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


@dataclass
class Errors:
    """Errors of one value, and of eager PyTorch in the target's precision at the same place."""

    ours: Sum = field(default_factory=Sum)
    eager: Sum = field(default_factory=Sum)
    exact: Sum = field(default_factory=Sum)  # the value itself

    def add(self, target: Tensor, exact: Tensor, eager: Tensor, *, ignored: float | None) -> None:
        """One call's numbers.

        Args:
            ignored: what cache slots hold that nobody reads; it says nothing of how large numbers are.
        """
        defined = ~torch.isnan(exact)  # a softmax over nothing, as another operator's fault may ask for, has no answer
        target, exact, eager = (each.to(torch.float64)[defined] for each in (target, exact, eager))
        same = target == exact  # infinities of masked scores among them
        self.ours.add(torch.where(same, 0.0, target - exact))
        self.eager.add(torch.where(eager == exact, 0.0, eager - exact))
        counted = torch.isfinite(exact)
        self.exact.add(exact[counted & (exact.abs() != ignored) if ignored else counted])

    def max_limit(self, dtype: str) -> float:
        """How large the largest error may be: runtimes.tolerances says why."""
        return MAX_MULTIPLE * self.eager.largest + FLOOR_ULPS * MACHINE_EPSILON[dtype] * self.exact.largest

    def rms_limit(self, dtype: str) -> float:
        """The same of their root mean square."""
        return RMS_MULTIPLE * self.eager.rms + FLOOR_ULPS * MACHINE_EPSILON[dtype] * self.exact.rms

    def within(self, dtype: str) -> bool:
        """Whether the target is as near as it should be; never where eager PyTorch itself overflows, which would let
        everything pass."""
        return math.isfinite(self.eager.largest) and self._is_near(dtype)

    def _is_near(self, dtype: str) -> bool:
        return self.ours.largest <= self.max_limit(dtype) and self.ours.rms <= self.rms_limit(dtype)
