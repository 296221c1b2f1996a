"""Triton's interpreter on the CPU: its faults repaired or refused, and a checker of what kernels do to memory.

``repair`` (once a process, TRITON_INTERPRET=1 set before Triton is imported):
  - products of bfloat16 blocks multiply bit patterns: their factors are widened first;
  - all other arithmetic on bfloat16, reductions too, works on bit patterns: refused, kernels must compute in float32;
  - casts from float32 to bfloat16 cut digits off, and both ways spoil tiny numbers: rounded to nearest, as on GPUs;
  - casts between whole numbers and bfloat16 move bit patterns: refused;
  - a scalar comparison spread over a block becomes a wider integer: narrowed again.
``checked`` watches every launch in its block and raises ``Violation`` for
  - accesses outside the elements of the tensors that were passed (gaps of strided views are outside too);
  - two lanes of one store, or two programs of a launch, writing one element;
  - a program reading what another one writes in the same launch, or writing what another one reads;
  - a program reading or overwriting what it wrote, with no barrier between: the thread that has a lane may be another
    one in every access;
  - a program overwriting in one lane what another lane read, with no barrier between.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor


class Violation(AssertionError):
    pass


def widened(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return handle


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


# Operations that move bfloat16 values without calculating, and those that are repaired below.
MOVES = re.compile(
    "create_((masked_|tensor_pointer_)?(load|store)|select|(un)?splat|broadcast|expand_dims|reshape|trans|join|split|cat"
    "|gather|bitcast|fabs|print|dot|fp_to_fp|fp_ext|fp_trunc)"
)


def repair() -> None:
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    dot, splat, cast, to_float = Builder.create_dot, Builder.create_splat, Builder.cast_impl, Builder.create_fp_to_fp
    apply = interpreter.ReduceScanOpInterface.apply

    def refusing(operation):
        def create(self, *arguments, **options):
            handles = [a for a in (*arguments, *options.values()) if isinstance(a, interpreter.TensorHandle)]
            if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
                raise TypeError("bfloat16 arithmetic is wrong in the interpreter: cast to float32 first")
            return operation(self, *arguments, **options)

        return create

    for name in dir(Builder):
        if name.startswith("create_") and not MOVES.fullmatch(name):
            setattr(Builder, name, refusing(getattr(Builder, name)))

    def refusing_apply(self, values):
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype.scalar == tl.bfloat16:
                raise TypeError("reductions of bfloat16 are wrong in the interpreter: cast to float32 first")
        return apply(self, values)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def create_splat(self, kind, value):
        handle = splat(self, kind, value)
        wanted = interpreter._get_np_dtype(kind)
        if handle.data.dtype == wanted:
            return handle
        return interpreter.TensorHandle(handle.data.astype(wanted), kind.scalar)

    def cast_impl(self, source, kind):
        kinds = (source.dtype.scalar, kind.scalar)
        if tl.bfloat16 in kinds and not {*kinds} <= {tl.bfloat16, tl.float32}:
            raise TypeError(f"casts between {source.dtype} and {kind} are wrong in the interpreter: go by float32")
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        return widened(source) if kinds == (tl.bfloat16, tl.float32) else cast(self, source, kind)

    def create_fp_to_fp(self, source, kind, rounding):
        if tl.bfloat16 in (source.dtype.scalar, kind.scalar) and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return cast_impl(self, source, kind)
        return to_float(self, source, kind, rounding)

    Builder.create_dot, Builder.create_splat, Builder.cast_impl, Builder.create_fp_to_fp = (
        create_dot,
        create_splat,
        cast_impl,
        create_fp_to_fp,
    )
    interpreter.ReduceScanOpInterface.apply = refusing_apply


class Shadow:
    """What happened to each element of one storage in this launch: by which program and lane, after which barrier."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        self.name, self.start, self.size = name, storage.data_ptr(), tensor.element_size()
        count = storage.nbytes() // self.size
        self.end = self.start + count * self.size
        self.passed = np.zeros(count, bool)
        self.writer, self.write_epoch = (np.full(count, self.NOBODY, np.int64) for _ in range(2))
        self.reader, self.read_lane, self.read_epoch = (np.full(count, self.NOBODY, np.int64) for _ in range(3))

    def add(self, tensor: torch.Tensor) -> None:
        places = torch.arange(self.passed.size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        self.passed[places.reshape(-1).numpy()] = True


class Watch:
    def __init__(self) -> None:
        self.shadows: list[Shadow] = []
        self.program, self.epoch = -1, 0

    def start(self, arguments: dict[str, Any]) -> None:
        self.shadows, self.program, self.epoch = [], -1, 0
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                continue
            start = value.untyped_storage().data_ptr()
            shadow = next((s for s in self.shadows if s.start == start), None)
            if shadow is None:
                shadow = Shadow(value, name)
                self.shadows.append(shadow)
            shadow.add(value)

    def places(self, pointers: Any, mask: Any, what: str) -> Iterator[tuple[Shadow, np.ndarray, np.ndarray]]:
        """(storage, elements, lanes) that an access touches."""
        address = np.asarray(pointers.data).astype(np.int64).ravel()
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), np.shape(pointers.data)).ravel()
        lanes = np.flatnonzero(active)
        address = address[lanes]
        for shadow in self.shadows:
            here = (address >= shadow.start) & (address < shadow.end)
            if not here.any():
                continue
            elements = (address[here] - shadow.start) // shadow.size
            if not shadow.passed[elements].all():
                raise Violation(f"{what} outside {shadow.name}: program {self.program} reaches into a gap of it")
            yield shadow, elements, lanes[here]
            lanes, address = lanes[~here], address[~here]
        if address.size:
            raise Violation(f"{what} outside every tensor: {address.size} lanes of program {self.program}")

    def load(self, pointers: Any, mask: Any) -> None:
        for shadow, i, lanes in self.places(pointers, mask, "load"):
            writer = shadow.writer[i]
            if ((writer != shadow.NOBODY) & (writer != self.program)).any():
                raise Violation(f"{shadow.name}: program {self.program} reads what another one wrote")
            if ((writer == self.program) & (shadow.write_epoch[i] == self.epoch)).any():
                raise Violation(f"{shadow.name}: program {self.program} reads what it wrote, with no barrier between")
            other = (shadow.reader[i] != shadow.NOBODY) & (shadow.reader[i] != self.program)
            again = (
                (shadow.reader[i] == self.program)
                & (shadow.read_epoch[i] == self.epoch)
                & (shadow.read_lane[i] != lanes)
            )
            shadow.read_lane[i] = np.where(again, shadow.SEVERAL, lanes)
            order, counts = np.unique(i, return_counts=True)
            shadow.read_lane[order[counts > 1]] = shadow.SEVERAL
            shadow.reader[i] = np.where(other, shadow.SEVERAL, self.program)
            shadow.read_epoch[i] = self.epoch

    def store(self, pointers: Any, mask: Any) -> None:
        for shadow, i, lanes in self.places(pointers, mask, "store"):
            if np.unique(i).size != i.size:
                raise Violation(f"{shadow.name}: two lanes of one store write one element")
            writer, reader = shadow.writer[i], shadow.reader[i]
            if ((writer != shadow.NOBODY) & (writer != self.program)).any():
                raise Violation(f"{shadow.name}: two programs write one element")
            if ((reader != shadow.NOBODY) & (reader != self.program)).any():
                raise Violation(f"{shadow.name}: program {self.program} writes what another one reads")
            read = (reader == self.program) & (shadow.read_epoch[i] == self.epoch) & (shadow.read_lane[i] != lanes)
            wrote = (writer == self.program) & (shadow.write_epoch[i] == self.epoch)
            if (read | wrote).any():
                raise Violation(
                    f"{shadow.name}: program {self.program} overwrites what a lane uses, with no barrier between"
                )
            shadow.writer[i], shadow.write_epoch[i] = self.program, self.epoch


@contextlib.contextmanager
def checked() -> Iterator[None]:
    watch = Watch()
    names = ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx")
    load, store, barrier, place = (getattr(Builder, name) for name in names)
    call = Executor.__call__

    def create_masked_load(self, pointers, mask, *rest):
        watch.load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        watch.store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_barrier(self, *rest):
        watch.epoch += 1
        return barrier(self, *rest)

    def set_grid_idx(self, *index):
        watch.program += 1
        watch.epoch += 1
        return place(self, *index)

    def refuse(self, *_, **__):
        raise Violation("an atomic operation: sums would depend on the order of programs")

    def __call__(self, *arguments, **options):
        watch.start({**dict(zip(self.arg_names, arguments, strict=False)), **options})
        try:
            return call(self, *arguments, **options)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Violation):  # one more for each function called
                cause = cause.__cause__
            raise (cause or error) from None

    patch = {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_barrier": create_barrier,
        "set_grid_idx": set_grid_idx,
    }
    patch |= {name: refuse for name in dir(Builder) if name.startswith("create_atomic_")}
    before = {name: getattr(Builder, name) for name in patch}
    for name, function in patch.items():
        setattr(Builder, name, function)
    Executor.__call__ = __call__
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Builder, name, function)
        Executor.__call__ = call
