"""Correctness and speed on a GPU, in one command of a few minutes: ``make gpu``, or ``python -m benchmarks.gpu``.

Each part runs in a process of its own, so that a kernel that hangs or spoils the GPU's context costs one item and not
the run. What is measured, and what it is compared with, is the machinery of the benchmarks of the processor.
"""
