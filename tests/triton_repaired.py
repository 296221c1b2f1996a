"""The repaired interpreter and its checker themselves, on kernels of a few lines; run as triton_interpreted.py is."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreter import Violation, checked, repair

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
repair()

BF16 = torch.bfloat16


# ---- bfloat16: right, or refused


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def masked(x, out, count):
    i = tl.arange(0, 16)
    v = tl.load(x + i, mask=i < count, other=1.5)
    tl.store(out + i, tl.where(i < 1, tl.abs(v), v))


def test_floats_become_bfloat16_as_torch_rounds_them():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -3e-39, 3.4e38])
    x = torch.cat([torch.randn(4096 - 12), ties, special])
    out = torch.zeros(4096, dtype=BF16)
    copy[(1,)](x, out, 4096)
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    back = torch.zeros(4096)
    copy[(1,)](out, back, 4096)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_moves_as_it_is():
    x, out = torch.randn(16).to(BF16), torch.zeros(16, dtype=BF16)
    masked[(1,)](x, out, 5)
    wanted = torch.where(torch.arange(16) < 5, x, 1.5)
    wanted[0] = x[0].abs()
    assert torch.equal(out, wanted.to(BF16))


@triton.jit
def calculate(x, WHAT: tl.constexpr):
    v = tl.load(x + tl.arange(0, 16))
    if WHAT == "add":
        v = v + v
    elif WHAT == "negate":
        v = -v
    elif WHAT == "compare":
        v = v > v
    elif WHAT == "fma":
        v = tl.fma(v, v, v)
    elif WHAT == "sum":
        v = tl.sum(v, 0)
    elif WHAT == "cumsum":
        v = tl.associative_scan(v, 0, add)


@triton.jit
def add(a, b):
    return a + b


@pytest.mark.parametrize("what", ["add", "negate", "compare", "fma", "sum", "cumsum"])
def test_calculating_in_bfloat16_is_refused(what):
    with pytest.raises(Exception, match="wrong in the interpreter"):
        calculate[(1,)](torch.zeros(16, dtype=BF16), what)
    calculate[(1,)](torch.zeros(16), what)


def test_whole_numbers_do_not_become_bfloat16():
    with pytest.raises(Exception, match="go by float32"):
        copy[(1,)](torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=BF16), 16)


# ---- the checker


@triton.jit
def move(x, out, x_step, out_step, shift, count, BLOCK: tl.constexpr):
    """Each program copies BLOCK numbers of x, from ``shift`` on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i * out_step, tl.load(x + (i + shift) * x_step, mask=i < count), mask=i < count)


@triton.jit
def turn(x, WRITE: tl.constexpr, BARRIER: tl.constexpr, FROM: tl.constexpr):
    """Writes, reads and writes again; the last time in other lanes, if FROM is not 0."""
    i = tl.arange(0, 8)
    if WRITE:
        tl.store(x + i, i.to(tl.float32))
        if BARRIER:
            tl.debug_barrier()
    v = tl.load(x + i)
    if FROM and BARRIER:
        tl.debug_barrier()
    tl.store(x + (FROM - i if FROM else i), v)


def even(count):
    """``count`` numbers with a gap after each."""
    return torch.zeros(2 * count)[::2]


# (arguments of move, programs, what the checker says)
MOVES = {
    "a whole tensor": ((torch.zeros(16), torch.zeros(16), 1, 1, 0, 16), 2, ""),
    "masked": ((torch.zeros(13), torch.zeros(13), 1, 1, 0, 13), 2, ""),
    "every second": ((even(16), even(16), 2, 2, 0, 16), 2, ""),
    "read behind the end": ((torch.zeros(16), torch.zeros(16), 1, 1, 1, 16), 2, "load outside"),
    "read before the start": ((torch.zeros(16), torch.zeros(16), 1, 1, -1, 16), 2, "load outside"),
    "written behind the end": ((torch.zeros(16), torch.zeros(15), 1, 1, 0, 16), 2, "store outside"),
    "read from a gap": ((even(16), torch.zeros(16), 1, 1, 0, 16), 2, "load outside x: .* gap"),
    "written to a gap": ((torch.zeros(16), even(16), 1, 1, 0, 16), 2, "store outside out: .* gap"),
    "lanes on one element": ((torch.zeros(16), torch.zeros(16), 1, 0, 0, 16), 2, "two lanes of one store"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVES)
def test_where_kernels_read_and_write(case):
    arguments, programs, message = MOVES[case]
    with checked():
        if not message:
            move[(programs,)](*arguments, 8)
            return
        with pytest.raises(Violation, match=message):
            move[(programs,)](*arguments, 8)


def test_programs_of_one_launch_keep_apart():
    x = torch.zeros(32)
    with checked():
        move[(2,)](x, x, 1, 1, 0, 16, 8)  # each on its own
        with pytest.raises(Violation, match="reads what another one wrote"):
            move[(2,)](x[8:], x[16:], 1, 1, 0, 16, 8)
        with pytest.raises(Violation, match="writes what another one reads"):
            move[(2,)](x[8:], x, 1, 1, 0, 16, 8)
        with pytest.raises(Violation, match="two programs write one element"):
            move[(9,)](torch.zeros(9), torch.zeros(1), 1, 0, 0, 9, 1)


@pytest.mark.parametrize(
    ("write", "other_lanes", "message"),
    [(True, False, "reads what it wrote"), (False, True, "overwrites what a lane uses"), (False, False, "")],
)
def test_lanes_need_barriers(write, other_lanes, message):
    with checked():
        turn[(1,)](torch.zeros(8), write, True, 7 * other_lanes)
        if not message:  # each lane changes what it read
            turn[(1,)](torch.zeros(8), write, False, 7 * other_lanes)
            return
        with pytest.raises(Violation, match=f"{message}, with no barrier between"):
            turn[(1,)](torch.zeros(8), write, False, 7 * other_lanes)


@triton.jit
def atomic(x, SWAP: tl.constexpr):
    if SWAP:
        tl.atomic_cas(x, 0.0, 1.0)
    else:
        tl.atomic_add(x, 1.0)


@pytest.mark.parametrize("swap", [True, False])
def test_atomics_are_refused(swap):
    with checked(), pytest.raises(Violation, match="atomic"):
        atomic[(1,)](torch.zeros(1), swap)
