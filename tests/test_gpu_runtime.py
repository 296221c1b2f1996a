"""What a GPU program relies on beside right results: streams, graphs, no waiting, few launches, size, determinism."""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_support import (
    DEVICE,
    ON_GPU,
    PRECISIONS,
    both_layouts,
    both_modes,
    check,
    fused_on,
    gpu_only,
    make_unit,
    needs_device,
    place,
    run,
)

from fif_ops import FusedFiF, Norm, feature_augment

pytest_plugins = ["gpu_support"]
pytestmark = [needs_device, pytest.mark.usefixtures("whole_context")]
HERE = Path(__file__).parent
sixteen = pytest.mark.parametrize("name", ["fp16", "fp32"])


def problem(training, last=False, dtype=torch.float32, batch=4, size=(14, 14), **options):
    """A fused unit, its input and the gradient of its output."""
    unit = make_unit(16, 32, **options).to(DEVICE, dtype).train(training)
    x = place(torch.randn(batch, 16, *size).to(dtype), last)
    upstream = place(torch.randn(batch, 32, *size).to(dtype), last) if training else None
    return fused_on(unit, x, last), x, upstream


def equal(found, wanted):
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# ---- streams and graphs


@gpu_only
@both_layouts
@both_modes
def test_side_stream(gpu_backend, training, last):
    """The input is late on that stream: a kernel on another one would read what was there before."""
    unit, x, upstream = problem(training, last)
    wanted = run(copy.deepcopy(unit), x, upstream)
    late, stream = torch.full_like(x, float("nan")), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = run(unit, late, upstream)
    stream.synchronize()
    assert equal(found, wanted)


@gpu_only
@both_modes
def test_two_streams_at_once(gpu_backend, training):
    problems = [problem(training, last, size=(28, 28)) for last in (False, True)]
    wanted = [run(copy.deepcopy(unit), x, upstream) for unit, x, upstream in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(20):
        for stream, (unit, x, upstream) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(copy.deepcopy(unit), x, upstream))
    torch.cuda.synchronize()
    assert all(equal(values, wanted[i % 2]) for i, values in enumerate(found))


@gpu_only
def test_first_calls_under_capture(gpu_backend):
    command = [sys.executable, HERE / "gpu_program.py", "capture", gpu_backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr


@gpu_only
@both_layouts
@both_modes
def test_replays_with_new_data(gpu_backend, training, last):
    unit, x, upstream = problem(training, last)
    run(unit, x, upstream)
    twin = copy.deepcopy(unit)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(unit, x, upstream)
    for _ in range(3):
        x.normal_()
        if upstream is not None:
            upstream.normal_()
        graph.replay()
        assert equal(found, run(twin, x, upstream))


@gpu_only
@both_layouts
@both_modes
def test_host_never_waits(gpu_backend, training, last):
    unit, x, upstream = problem(training, last)
    run(unit, x, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(unit, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- launches


def launches(action):
    """Kernels, fills and copies that a call starts on the device."""
    action()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        action()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@gpu_only
@sixteen
@both_layouts
@pytest.mark.parametrize("shape", [(16, 8, 56), (80, 92, 14), (160, 480, 7)], ids=["56", "14", "7"])
def test_launches(gpu_backend, shape, last, name):
    """Of the unit alone, without the counters of batches that its module keeps."""
    channels, maps, size = shape
    dtype = PRECISIONS[name].dtype
    x = place(torch.randn(8, channels, size, size).to(dtype), last).requires_grad_()
    weights = [
        torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True)
        for s in ((maps, channels, 1, 1), (maps, 1, 3, 3))
    ]

    def norm(training):
        affine = [torch.rand(maps, device=DEVICE, requires_grad=True) for _ in range(2)]
        return Norm(*affine, torch.zeros(maps, device=DEVICE), torch.ones(maps, device=DEVICE), training, 0.1, 1e-5)

    with torch.no_grad():
        norms = norm(False), norm(False)
        found = launches(lambda: feature_augment(x, *weights, primary_norm=norms[0], cheap_norm=norms[1]))
    assert len(found) == 1, found
    norms = norm(True), norm(True)
    forward = launches(lambda: feature_augment(x, *weights, primary_norm=norms[0], cheap_norm=norms[1]))
    assert 0 < len(forward) <= 3, forward
    out = feature_augment(x, *weights, primary_norm=norms[0], cheap_norm=norms[1])
    leaves = [x, *weights, *norms[0][:2], *norms[1][:2]]
    upstream = torch.randn_like(out)
    backward = launches(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    assert 0 < len(backward) <= 4, backward


# ---- size


def free_gib():
    return torch.cuda.mem_get_info(DEVICE)[0] / 2**30


@gpu_only
@both_layouts
@both_modes
def test_more_than_2_31_elements(gpu_backend, training, last):
    """The last images of a huge batch come out as they do by themselves; frozen statistics, so that they can."""
    needed = 60 if training else 16
    if free_gib() < needed:
        pytest.skip(f"needs {needed} GiB of free GPU memory, there are {free_gib():.0f}")
    batch = 2**31 // (16 * 112 * 112) + 3
    unit = make_unit(16, 16).to(DEVICE, torch.float16).eval()
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty((batch, 16, 112, 112), dtype=torch.float16, device=DEVICE, memory_format=layout).normal_()
    fused, tail = fused_on(unit, x, last), x[-2:].clone(memory_format=torch.preserve_format)
    upstream = None
    if training:
        upstream = torch.empty_like(x).normal_()
    found = run(fused, x, upstream)
    wanted = run(fused, tail, None if upstream is None else upstream[-2:].clone(memory_format=torch.preserve_format))
    for ours, theirs in zip(found[: 1 + training], wanted, strict=False):  # the result, and the gradient of x
        assert (ours[-2:] - theirs).float().norm() <= 2e-3 * theirs.float().norm()


# ---- determinism, and nothing read that nobody wrote


@contextlib.contextmanager
def deterministic():
    """Within the block torch refuses what is not deterministic, and fills fresh tensors with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@sixteen
@both_layouts
@both_modes
@pytest.mark.parametrize("size", [(56, 56), (7, 7)], ids=["56", "7"])
def test_ten_runs_are_bitwise_equal(gpu_backend, size, training, last, name):
    unit, x, upstream = problem(training, last, PRECISIONS[name].dtype, batch=16, size=size)
    with deterministic():
        first = run(copy.deepcopy(unit), x, upstream)
        for _ in range(9):
            assert equal(run(copy.deepcopy(unit), x, upstream), first)


@sixteen
@both_layouts
@both_modes
def test_fresh_tensors_full_of_nan(gpu_backend, training, last, name):
    precision = PRECISIONS[name]
    for channels, maps, size in ((16, 32, (14, 14)), (7, 10, (9, 13)), (40, 132, (7, 7)), (8, 16, (1, 1))):
        unit = make_unit(channels, maps, activation="silu")
        x = place(torch.randn(12, channels, *size).to(precision.dtype), last)
        upstream = place(torch.randn(12, maps, *size).to(precision.dtype), last) if training else None
        with deterministic():
            assert torch.empty(4, device=DEVICE).isnan().all()
            check(unit, x, upstream, precision, last)


# ---- several GPUs, and the compiler


@gpu_only
@both_modes
def test_second_gpu(gpu_backend, training):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    unit, x, upstream = problem(training)
    wanted = run(copy.deepcopy(unit), x, upstream)
    there = torch.device("cuda", 1 - torch.cuda.current_device())
    found = run(unit.to(there), x.to(there), None if upstream is None else upstream.to(there))
    assert all(tensor.device == there for tensor in found)
    assert equal([tensor.to(DEVICE) for tensor in found], wanted)


@pytest.mark.skipif(not ON_GPU, reason="the processor's tests have it")
@both_layouts
def test_compiled_train_step(gpu_backend, last):
    unit, x, upstream = problem(True, last)
    compiled = torch.compile(copy.deepcopy(unit), fullgraph=True, dynamic=False)
    found, wanted = run(compiled, x, upstream), run(unit, x, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.skipif(not ON_GPU, reason="the processor's tests have it")
def test_checkpoints_load_across_devices(gpu_backend):
    unit, x, _ = problem(False)
    twin = FusedFiF(16, 32)
    twin.load_state_dict({name: value.cpu() for name, value in unit.state_dict().items()})
    assert equal(run(twin.to(DEVICE).eval(), x), run(unit, x))
