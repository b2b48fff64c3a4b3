"""What `freeze` leaves where one call of the engine computes several modules of an `nn.Sequential`."""

from __future__ import annotations

from torch import Tensor, nn


class Absorbed(nn.Identity):
    """In the place of a module that a call before it computes: places and names of the others stay what they were."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse to be called, by a forward that runs an `nn.Sequential` part by part: what it wants is gone.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "Absorbed: got a call of a part that the call before it computes, wanted its nn.Sequential called as a "
            "whole; freeze(model, trace=True) reads a forward that calls the parts"
        )


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that leaves out what is `Absorbed`."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the modules that compute something, one after the other."""
        for module in self._modules.values():
            if type(module) is not Absorbed:
                assert module is not None
                x = module(x)
        return x
