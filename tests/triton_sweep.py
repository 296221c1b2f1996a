"""Every kernel, configuration and kind of shape compiled for every kind of GPU: an hour of one core, so run by hand.

pytest tests/triton_sweep.py, after a change in the kernels; test_triton_kernels.py compiles a part of it.
"""

import pytest
import torch
from triton_offline import NO_SPILLS, SHARED_MEMORY, arguments, check_compiled, compiled, key, launches_of

from fif_ops.backends.triton import config
from fif_ops.backends.triton.host import unit_of

KINDS = ("float16", "float32", "tf32")
CASES = {
    "5x5": {"kernel": 5, "activation": "gelu"},
    "ratio 4": {"maps": 16, "multiplier": 3, "activation": "silu"},
    "unaligned": {"channels": 80, "maps": 92, "size": 14},
    "narrow": {"channels": 72, "maps": 12, "size": 56, "activation": "hardswish"},
    "deep": {"channels": 960, "maps": 80, "size": 7},
    "wide": {"channels": 112, "maps": 336, "size": 14},
    "odd maps": {"channels": 160, "maps": 480, "size": 7},
    "large maps": {"channels": 16, "maps": 8, "size": 112},
    "stride": {"stride": 2, "activation": "relu6"},
    "maps of another convolution": {"primary": False},
    "one of everything": {"images": 1, "channels": 1, "maps": 1, "size": 1},
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("case", CASES)
def test_everything_compiled(case, last, kind, capability, monkeypatch):
    """No spills and little shared memory, whatever the shape."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    for launch in launches_of(monkeypatch, dtype, last, tf32=kind == "tf32", **CASES[case]):
        found = compiled(launch, capability)
        assert (found.spilled == 0 or not NO_SPILLS) and found.shared <= SHARED_MEMORY, (
            f"{launch.name} for sm_{capability}: {found}"
        )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("case", ["deep", "large maps"])
def test_every_candidate_compiled(case, last, kind, capability, monkeypatch):
    """What the tuner may choose, for the widest and the narrowest units."""
    dtype, options = torch.float32 if kind == "tf32" else getattr(torch, kind), CASES[case]
    positional, named = arguments("infer", dtype, last, tf32=kind == "tf32", **options)
    unit = unit_of(*positional[:3], *positional[15:], stride=1, groups=1, tf32=named["tf32"])
    launches = {}
    for kernel in ("infer", *config.CANDIDATES):
        for number in range(config.candidate_count(kernel, unit)):
            config.force(config.bucket(kernel, unit), number)
            if kernel != "infer":  # what is not fused needs the other kernels
                config.force(config.bucket("infer", unit), config.candidate_count("infer", unit) - 1)
            made = launches_of(monkeypatch, dtype, last, tf32=kind == "tf32", **options)
            launches.update((key(launch), launch) for launch in made)
            config.reset()
    for launch in launches.values():
        check_compiled(launch, capability, dtype, kind == "tf32")
