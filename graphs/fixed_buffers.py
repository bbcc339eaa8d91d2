"""Buffers that follow from a module's arguments: computed, never stored, and float32 whatever the module is cast to."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module whose buffers are `real_buffers`; it registers them with `_register`."""

    @abstractmethod
    def real_buffers(self) -> dict[str, Tensor]:
        """The buffers' values, on the CPU."""

    def _register(self) -> None:
        for name, table in self.real_buffers().items():
            self.register_buffer(name, table.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but stay float32: a rounded frequency is off by whole turns."""
        super()._apply(fn, recurse)
        for name, table in self.real_buffers().items():
            setattr(self, name, table.to(self.get_buffer(name).device))
        return self
