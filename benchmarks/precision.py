"""In which format a task is done, and how far from the float64 reference its results may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """A format, and the relative L2 errors allowed in it.

    Twice what the plain composition of the same format and layout shows is allowed too, since batch statistics can be
    ill-conditioned, but never more than the ceiling. ``kink``: normalised values this near to 0 get either sign by
    rounding, and so does relu's gradient there; 0 where the plain composition shows that by itself, because it rounds
    so many of them.
    """

    name: str
    dtype: torch.dtype
    inference_limit: float
    training_limit: float
    unit_ceiling: float
    network_ceiling: float
    kink: float = 0.0
    tf32: bool = False

    @contextlib.contextmanager
    def switched(self, device: torch.device) -> Iterator[None]:
        """Within the block torch's convolutions and products on a GPU use tf32 only if this is tf32."""
        if device.type != "cuda":
            yield
            return
        switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [switch.allow_tf32 for switch in switches]
        for switch in switches:
            switch.allow_tf32 = self.tf32
        try:
            yield
        finally:
            for switch, state in zip(switches, before, strict=True):
                switch.allow_tf32 = state


# Torch's batch statistics of channels_last maps lose most: 2e-2 in the gradients of a whole network in float32.
FP32 = Precision("fp32", torch.float32, 1e-5, 1e-4, 1e-2, 5e-2, kink=3e-6)
TF32 = Precision("tf32", torch.float32, 2e-3, 5e-3, 2e-1, 3e-1, tf32=True)
# In 16 bits, the gradients of a whole untrained network are a quarter (float16) or more noise.
FP16 = Precision("fp16", torch.float16, 3e-3, 5e-3, 2e-1, 6e-1)
BF16 = Precision("bf16", torch.bfloat16, 1e-2, 2e-2, 3e-1, 9e-1)
PRECISIONS = {precision.name: precision for precision in (FP16, BF16, TF32, FP32)}
