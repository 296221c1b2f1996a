"""What the measurements ask of a device: its clock, launches, host time, memory, bandwidth and description.

``Cuda`` is a GPU; ``Dry`` runs the same code on the processor, so that the whole can be tried where there is no GPU.
Its figures mean nothing.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from fif_ops import FusedFiF, __version__, explain, info, ops

from ..shapes import Task
from ..timing import WALL, Clock

Action = Callable[[], Any]
FLUSHED = 256 * 2**20  # bytes written before every timed call: several times the second-level cache
COPIED = 2**30  # bytes of the copy that measures the bandwidth
LONGEST_LEAD = 5e-3  # seconds


class EventClock:
    """Times of the device between two events, the caches cold, and the host far enough ahead that it never waits.

    Before every call a large buffer is written, then the device is kept busy for as long as the host needed to enqueue
    the last such call: what is left is the time of the kernels and of the gaps between them.
    """

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED // 4, dtype=torch.int32, device=device)
        self._leads: dict[int, float] = {}
        self._device = device
        self._cycles = 1e6
        self._cycles /= self._sleep_seconds()

    def _sleep_seconds(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            start.record()
            torch.cuda._sleep(int(self._cycles))
            end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1e-3

    def sample(self, action: Action, repeats: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        lead = self._leads.get(id(action), 20e-6)
        for start, end in events:
            self._flushed.zero_()
            torch.cuda._sleep(int(self._cycles * min(1.5 * lead, LONGEST_LEAD)))
            before = perf_counter()
            start.record()
            action()
            end.record()
            lead = perf_counter() - before
        self._leads[id(action)] = lead
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in events) * 1e-3 / repeats


class Device(Protocol):
    """See the top of this file."""

    @property
    def device(self) -> torch.device:
        """Where tasks are made."""
        ...

    @property
    def clock(self) -> Clock:
        """Measures calls."""
        ...

    def synchronize(self) -> None:
        """Waits for all work."""
        ...

    def launches(self, action: Action) -> dict[str, int]:
        """How often a call launches each kernel, by name."""
        ...

    def peak_bytes(self, action: Action) -> int:
        """Memory that a call takes at its peak beyond what is held before it."""
        ...

    def replay(self, action: Action, state: Sequence[Tensor]) -> Action:
        """A call that replays the kernels of ``action``; ``state``, which it changes, is left as it is until then."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes that a large copy reads and writes in a second."""
        ...

    def facts(self) -> dict[str, Any]:
        """The machine, for JSON."""
        ...


class Cuda:
    """An NVIDIA GPU."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)

    @functools.cached_property
    def clock(self) -> Clock:
        return EventClock(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def launches(self, action: Action) -> dict[str, int]:
        action()  # so that nothing is left to prepare
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            action()
            self.synchronize()
        return Counter(
            event.name
            for event in profile.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )

    def peak_bytes(self, action: Action) -> int:
        action()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def replay(self, action: Action, state: Sequence[Tensor]) -> Action:
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = action()

        def step() -> Any:
            graph.replay()
            return result

        return step

    def copy_bandwidth(self) -> float:
        source = torch.randn(COPIED // 4, device=self.device)
        target = torch.empty_like(source)
        self.clock.sample(lambda: target.copy_(source), 3)
        return 2 * COPIED / median(self.clock.sample(lambda: target.copy_(source), 1) for _ in range(9))

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return _common_facts() | {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }


class Dry:
    """The processor in place of a GPU, for a trial run."""

    device = torch.device("cpu")
    clock = WALL

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def launches(self, action: Action) -> dict[str, int]:
        action()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            action()
        return Counter(e.name for e in profile.events() if e.cpu_parent is None)

    def peak_bytes(self, action: Action) -> int:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            action()
        return saved

    def replay(self, action: Action, state: Sequence[Tensor]) -> Action:
        return action

    def copy_bandwidth(self) -> float:
        source = torch.randn(2**20)
        target = torch.empty_like(source)
        return 2 * 2**22 / median(WALL.sample(lambda: target.copy_(source), 1) for _ in range(9))

    def facts(self) -> dict[str, Any]:
        return _common_facts() | {"device": f"no GPU, a trial run on {info.machine()['processor']}"}


def open_device(name: str) -> Device:
    """The device of this name: "cuda" or "cpu". Raises RuntimeError if there is no GPU."""
    if name == "cpu":
        return Dry()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no NVIDIA GPU; --device cpu tries the script without one")
    return Cuda()


def host_seconds(device: Device, action: Action, calls: int = 20, batches: int = 5) -> float:
    """How long a call keeps the host busy: to check, allocate and enqueue, the device's work not waited for."""
    samples = []
    for _ in range(batches):
        device.synchronize()
        start = perf_counter()
        for _ in range(calls):
            action()
        samples.append((perf_counter() - start) / calls)
    device.synchronize()
    return median(samples)


def backends_used(network: nn.Module, task: Task) -> dict[str, int]:
    """How many fused units of the network run on each backend, on the first two images; changes its statistics."""
    found: Counter[str] = Counter()
    for unit in network.modules():
        if isinstance(unit, FusedFiF):
            unit.register_forward_pre_hook(lambda module, inputs: found.update([explain(module, inputs[0]).backend]))
    with torch.set_grad_enabled(task.training), task.autocast():
        network(task.x[:2])
    return dict(found)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _common_facts() -> dict[str, Any]:
    return info.machine() | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fif_ops": __version__,
        "instruction_set": ops.CPU_ISA,
        "library": ops.library_info()["built_for"],
    }
