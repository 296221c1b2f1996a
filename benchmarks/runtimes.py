"""Peers outside torch's eager mode and ``torch.compile``: each exports a task's module once and returns a step.

Every runtime gets its input where it wants it and writes its result where it wants it, both allocated beforehand; the
layout is the peer's own, so that nothing is transposed, copied or wrapped within the time that is taken. A step
returns the result as a torch tensor over the runtime's memory, in the shape (B, N, H, W) that all peers have.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fif_ops import FeatureAugment

from .shapes import Task

Step = Callable[[], Any]
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def missing(package: str, *modules: str) -> str:
    """Why a runtime cannot run, or "" if its modules are installed."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{package} needs {', '.join(absent)}: pip install '.[peers]'" if absent else ""


def no_inference(task: Task) -> str:
    """Why a runtime for inference cannot do the task, or ""."""
    return "does inference only" if task.training else ""


def no_fp32_inference(task: Task) -> str:
    """The same for those that convolve in float32 alone on processors."""
    reason = no_inference(task)
    return reason or ("" if task.x.dtype == torch.float32 else f"has no {task.precision.name} convolution here")


def no_fp32_unit(task: Task) -> str:
    """The same where a model is a single unit, written by hand: see ``unit_flatbuffer``."""
    reason = no_fp32_inference(task)
    if reason or isinstance(task.module, FeatureAugment):
        return reason
    return "only units are converted: litert-torch, which converts networks, takes jax and transformers along"


def no_unit_inference(task: Task) -> str:
    """The same for AOTInductor."""
    reason = no_inference(task)
    return reason or ("" if isinstance(task.module, FeatureAugment) else "only units: a network compiles for minutes")


class Bound:
    """A step: ``run`` writes ``result``; ``held`` keeps alive what both point into."""

    def __init__(self, run: Callable[[], Any], result: Tensor, *held: Any) -> None:
        self.run, self.result, self.held = run, result, held

    def __call__(self) -> Tensor:
        self.run()
        return self.result


def make_aoti(task: Task, channels_last: bool) -> Step:
    """Compiled ahead of time by AOTInductor, weights frozen into the library, and called as the package it makes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.no_grad():
        module = copy.deepcopy(task.module).to(memory_format=layout)
        x = task.x.clone(memory_format=layout)
        program = torch.export.export(module, (x,))
        with torch._inductor.config.patch(freezing=True):
            package = torch._inductor.aoti_compile_and_package(program)
    return functools.partial(torch._inductor.aoti_load_package(package), x)


@functools.lru_cache(maxsize=1)
def _onnx(module: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The module as ONNX in float32, batch norms folded; exported once for the runtimes that read it."""
    stream = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # The older of torch's exporters: the same graph, in 0.1 s instead of 1.5 s.
        warnings.simplefilter("ignore")
        module = copy.deepcopy(module).float()
        torch.onnx.export(module, (torch.zeros(shape),), stream, dynamo=False, input_names=["x"], output_names=["y"])
    return stream.getvalue()


def make_onnxruntime(task: Task) -> Step:
    """ONNX Runtime's CPU provider with all graph optimisations, input and output bound. It knows NCHW alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _onnx(task.module, task.x.shape), options, providers=["CPUExecutionProvider"]
    )
    x = task.x.contiguous()
    result = torch.empty(session.get_outputs()[0].shape)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, list(result.shape), result.data_ptr())
    return Bound(functools.partial(session.run_with_iobinding, binding), result, x)


def make_openvino(task: Task, channels_last: bool) -> Step:
    """OpenVINO for latency; NHWC means that the tensors at both ends are NHWC and the plugin chooses between them."""
    import openvino
    from openvino import properties

    element = openvino.Type.f32 if task.x.dtype == torch.float32 else openvino.Type.bf16
    core = openvino.Core()
    model = core.read_model(_onnx(task.module, task.x.shape), b"")
    ends = openvino.preprocess.PrePostProcessor(model)
    spatial = len(model.output(0).shape) == 4
    ends.input().tensor().set_element_type(element)
    ends.output().tensor().set_element_type(element)
    if channels_last:
        ends.input().tensor().set_layout(openvino.Layout("NHWC"))
        ends.input().model().set_layout(openvino.Layout("NCHW"))
        if spatial:
            ends.output().model().set_layout(openvino.Layout("NCHW"))
            ends.output().tensor().set_layout(openvino.Layout("NHWC"))
    settings = {
        properties.inference_num_threads: torch.get_num_threads(),
        properties.num_streams: 1,
        properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
        properties.hint.inference_precision: element,
        properties.hint.enable_cpu_pinning: False,  # the benchmark pins the process itself
    }
    compiled = core.compile_model(ends.build(), "CPU", settings)
    request = compiled.create_infer_request()
    x = task.x.permute(NHWC).contiguous() if channels_last else task.x.contiguous()
    result = torch.empty(tuple(compiled.output(0).shape), dtype=task.x.dtype)
    tensors = [_openvino_tensor(t, element) for t in (x, result)]
    request.set_input_tensor(tensors[0])
    request.set_output_tensor(tensors[1])
    shown = result.permute(NCHW) if channels_last and spatial else result
    return Bound(request.infer, shown, compiled, x, tensors)


def _openvino_tensor(tensor: Tensor, element: Any) -> Any:
    """An OpenVINO tensor over the memory of a torch one."""
    import openvino

    if tensor.dtype == torch.float32:
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
    return openvino.Tensor(tensor.view(torch.uint16).numpy(), openvino.Shape(list(tensor.shape)), element)


def make_litert(task: Task) -> Step:
    """XNNPACK, through LiteRT's interpreter, which knows NHWC alone."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=unit_flatbuffer(task), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], task.x.permute(NHWC).contiguous().numpy())
    # The memory of the interpreter's own tensor: invoke() writes there, and nothing is copied out.
    result = torch.from_numpy(interpreter.tensor(made["index"])())
    return Bound(interpreter._interpreter.Invoke, result.permute(NCHW), interpreter)


def unit_flatbuffer(task: Task) -> bytes:
    """The unit as a TFLite model: convolution, depthwise convolution and concatenation, norms and relus folded in."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as tfl

    unit = task.module
    activation = {"relu": tfl.ActivationFunctionType.RELU, None: tfl.ActivationFunctionType.NONE}[unit.activation]
    primary, cheap = (folded(stage) for stage in (unit.primary_conv, unit.cheap_operation))
    batch, _, height, width = task.x.shape
    sizes = [(batch, height, width, task.x.shape[1])]
    sizes += [(batch, height, width, n) for n in (len(primary[1]), len(cheap[1]), unit.out_channels)]
    constants = [
        primary[0].permute(0, 2, 3, 1),  # (M, k, k, C)
        primary[1],
        cheap[0].permute(1, 2, 3, 0),  # (1, 3, 3, N)
        cheap[1],
    ]
    model = tfl.ModelT(version=3, buffers=[tfl.BufferT()])
    tensors = [tfl.TensorT(shape=list(size), type=tfl.TensorType.FLOAT32, buffer=0, name=b"") for size in sizes]
    for constant in constants:
        model.buffers.append(tfl.BufferT(data=constant.contiguous().numpy().reshape(-1).view(np.uint8)))
        shape = list(constant.shape)
        tensors.append(tfl.TensorT(shape=shape, type=tfl.TensorType.FLOAT32, buffer=len(model.buffers) - 1, name=b""))
    kinds = (tfl.BuiltinOperator.CONV_2D, tfl.BuiltinOperator.DEPTHWISE_CONV_2D, tfl.BuiltinOperator.CONCATENATION)
    model.operatorCodes = [tfl.OperatorCodeT(deprecatedBuiltinCode=kind, builtinCode=kind) for kind in kinds]
    strides = {"strideW": 1, "strideH": 1, "padding": tfl.Padding.SAME, "fusedActivationFunction": activation}
    operators = [
        tfl.OperatorT(0, [0, 4, 5], [1], tfl.BuiltinOptions.Conv2DOptions, tfl.Conv2DOptionsT(**strides)),
        tfl.OperatorT(
            1,
            [1, 6, 7],
            [2],
            tfl.BuiltinOptions.DepthwiseConv2DOptions,
            tfl.DepthwiseConv2DOptionsT(**strides, depthMultiplier=unit.ratio - 1),
        ),
        tfl.OperatorT(2, [1, 2], [3], tfl.BuiltinOptions.ConcatenationOptions, tfl.ConcatenationOptionsT(axis=3)),
    ]
    model.subgraphs = [tfl.SubGraphT(tensors=tensors, inputs=[0], outputs=[3], operators=operators, name=b"unit")]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def folded(stage: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch normalisation that follows it, computed in float64."""
    conv, norm = stage[0], stage[1]
    weight = conv.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if conv.bias is None else conv.bias.detach().double()
    if isinstance(norm, nn.BatchNorm2d):
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale.reshape(-1, 1, 1, 1)
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
    return weight.float(), bias.float()
