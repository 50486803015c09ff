"""ONNX files: a traced network as a graph of ONNX's operators, that tells nothing of this machine; and its session."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import enfilade
from enfilade.errors import UserError
from enfilade.export_graph import ABOUT, AXES, cannot, description, inputs_of, output_axes, quiet, trace
from enfilade.predict import Predictor

VOLUME_OPSET = 20  # the first whose GridSample takes volumes


def to_onnx(predictor: Predictor, opset: int) -> Any:
    """The predictor's network as an `onnx.ModelProto`. Raises UserError where that cannot be done."""
    if opset < VOLUME_OPSET and getattr(predictor.network, "dda", None) is not None:
        raise UserError(
            f"the deformable convolution of volumes needs ONNX's GridSample of opset {VOLUME_OPSET}, not {opset}"
        )
    try:
        program, outputs = trace(predictor)
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs_of(predictor.network)),
                output_names=outputs,
                external_data=False,
                verbose=False,
                custom_translation_table={torch.ops.aten.grid_sampler_3d.default: sample_volume},
            )
        assert exported is not None
        proto = exported.model_proto
    except Exception as error:
        raise cannot(predictor, "ONNX", error) from error
    strip(proto)
    label_axes(proto)
    describe(proto, predictor)
    return proto


def sample_volume(input, grid, interpolation_mode: int, padding_mode: int, align_corners: bool):
    """`torch.nn.functional.grid_sample` of volumes as ONNX has it, which torch's exporter lacks."""
    from onnxscript import opset20

    kind = ("linear", "nearest")[interpolation_mode]
    beyond = ("zeros", "border", "reflection")[padding_mode]
    return opset20.GridSample(input, grid, align_corners=align_corners, mode=kind, padding_mode=beyond)


def strip(proto: Any) -> None:
    """Drop what the exporter noted for its own debugging: every node's Python stack, with the paths of this machine,
    and the shapes of inner maps as long formulas."""
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    proto.graph.doc_string = ""
    for value in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""


def label_axes(proto: Any) -> None:
    """Names for the free sizes, which the exporter calls s73 or by a formula."""
    for value in (*proto.graph.input, *proto.graph.output):
        names = AXES.get(value.name) or output_axes(value.name, shape(value))
        for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if isinstance(name, str):
                axis.dim_param = name


def shape(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def describe(proto: Any, predictor: Predictor) -> None:
    """Write into the file what it takes to use it: the meaning of inputs and outputs beside each, and as metadata
    (JSON, but for bare strings) what `export_graph.description` tells."""
    told = description(predictor)
    for key, value in told.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    proto.producer_name, proto.producer_version = "enfilade", enfilade.__version__
    proto.doc_string = told["description"]
    proto.graph.name = str(told.get("model", type(predictor.network).__name__))
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = ABOUT[value.name]


def runner(data: bytes) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A function that runs a serialized graph on a CPU, on as many threads as torch uses. Raises UserError where onnx
    or onnxruntime finds the graph invalid."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        onnx.checker.check_model(data, full_check=True)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # neither package has a common type for its errors
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the exported graph is not valid, and was not written: {reason}") from error
    return lambda feed: [np.asarray(x) for x in session.run(None, feed)]
