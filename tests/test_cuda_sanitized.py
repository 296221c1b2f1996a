"""The tests of the CUDA kernels once more, on the CPU: under sanitizers, in several orders of threads; and what of the
kernels all of them reach."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import cuda_module
import cuda_runs
import pytest
from cusim import toolchain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing())),
]
# Mode and order of threads: 0 is ascending, which test_cuda_kernels.py runs itself, 1 descending, 7 shuffled.
RUNS = [("plain", 7), ("address", 1), ("thread", 7)]
REPORTS = ("ERROR: AddressSanitizer", "runtime error:", "WARNING: ThreadSanitizer")
# A mistake for each mode: a line of infer.cu, what stands in its place, and what the sanitizer says.
PLANTED = {
    "address": ("block.prepare();", "block.prepare(); block.s.source[kPositions] = 0;", "use-after-poison"),
    "thread": ("__syncthreads();\n  block.depthwise();", "block.depthwise();", "data race"),
}


def said(done):
    """A sanitizer's report, if there is one, and the end of all that was printed."""
    text = done.stdout + done.stderr
    starts = [text.find(words) for words in REPORTS if words in text]
    return (text[min(starts) :][:4000] + "\n...\n" if starts else "") + text[-4000:]


@pytest.fixture(scope="module")
def runs():
    """All runs, as many at a time as there are cores, each waited for by its test."""
    possible = [(mode, order) for mode, order in RUNS if toolchain.missing(mode) is None]
    for mode in dict(possible):
        cuda_module.build(mode)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    yield {run: pool.submit(cuda_runs.run_tests, *run) for run in possible}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("mode", "order"), RUNS)
def test_kernels_in_other_orders_and_under_sanitizers(runs, mode, order):
    if (mode, order) not in runs:
        pytest.skip(toolchain.missing(mode))
    done = runs[mode, order].result()
    assert done.returncode == 0, said(done)
    assert " passed" in done.stdout


@pytest.mark.parametrize("mode", PLANTED)
def test_a_planted_mistake_is_caught(mode, tmp_path):
    """In a copy of the sources with the objects of those that stay as they are."""
    if reason := toolchain.missing(mode):
        pytest.skip(reason)
    cuda_module.build(mode)
    for folder in ("csrc", "tests", f"build/cusim/{mode}"):
        shutil.copytree(cuda_runs.ROOT / folder, tmp_path / folder)
    shutil.copy(cuda_runs.ROOT / "pyproject.toml", tmp_path)
    line, planted, words = PLANTED[mode]
    source = tmp_path / "csrc/cuda/infer.cu"
    text = source.read_text()
    assert text.count(line) == 1, f"infer.cu should have {line!r} once"
    source.write_text(text.replace(line, planted))
    done = cuda_runs.run_tests(mode, root=tmp_path)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr, said(done)


def test_every_instance_runs():
    """Every kernel that the launchers can choose is launched by a test, and so compared with the definition."""
    kernels = cuda_runs.coverage().kernels
    assert kernels
    idle = [name for name, count in sorted(kernels.items()) if count == 0]
    assert not idle, "\n".join(["no test launches", *idle])


def test_lines_run(record_property):
    lines = cuda_runs.coverage().lines
    missed = {name: [line for line, count in sorted(found.items()) if count == 0] for name, found in lines.items()}
    total, ran = sum(map(len, lines.values())), sum(len(found) - len(missed[name]) for name, found in lines.items())
    record_property("cuda_lines_run", f"{ran} of {total}")
    text = "\n".join(f"{name}: {', '.join(map(str, rows))}" for name, rows in sorted(missed.items()) if rows)
    print(f"{ran} of {total} lines with code ran; not these:\n{text}")
    assert ran >= 0.95 * total
