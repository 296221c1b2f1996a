"""Programs that tests run in processes of their own: ``python gpu_program.py small BACKEND`` or ``capture BACKEND``."""

import sys

import torch
from gpu_support import DEVICE, fused_on, make_unit, place, run

from fif_ops import backends


def small() -> None:
    """Every kernel on a few small shapes; for sanitizers, which watch."""
    for in_channels, out_channels, size, options in (
        (5, 14, (2, 9, 11), {}),
        (16, 32, (2, 7, 7), {"cheap_kernel_size": 5, "ratio": 4}),
        (33, 70, (1, 15, 6), {"splice": False, "activation": None}),
    ):
        for last in (False, True):
            for dtype in (torch.float16, torch.float32):
                unit = make_unit(in_channels, out_channels, **options).to(DEVICE, dtype)
                x = place(torch.randn(size[0], in_channels, *size[1:]).to(dtype), last)
                fused = fused_on(unit, x, last)
                run(fused.eval(), x)
                upstream = place(torch.randn(size[0], out_channels, *size[1:]).to(dtype), last)
                run(fused.train(), x, upstream)
    torch.cuda.synchronize()


def capture() -> None:
    """The first calls of all are captured, and replayed on other data."""
    for training in (False, True):
        unit = make_unit(16, 32, activation="silu").to(DEVICE).train(training)
        x = torch.randn(4, 16, 14, 14, device=DEVICE)
        upstream = torch.randn(4, 32, 14, 14, device=DEVICE) if training else None
        fused, plain = fused_on(unit, x), type(unit)._copy_of(unit).double()
        if training:  # torch's own engine prepares itself at its first backward pass
            run(torch.nn.BatchNorm2d(16, device=DEVICE), x, torch.ones_like(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(fused, x, upstream)
        for _ in range(2):
            x.normal_()
            graph.replay()
            wanted = run(plain, x.double(), None if upstream is None else upstream.double())
            for ours, theirs in zip(found, wanted, strict=True):
                assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), (ours, theirs)


if __name__ == "__main__":
    with backends.use(sys.argv[2]):
        {"small": small, "capture": capture}[sys.argv[1]]()
    print("done")
