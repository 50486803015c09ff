"""`torch.export` archives (.pt2): a traced network that torch alone loads and runs, here and, compiled, in C++."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from enfilade.errors import UserError
from enfilade.export_graph import ABOUT, AXES, cannot, description, inputs_of, output_axes, quiet, trace
from enfilade.predict import Predictor

NOTES = "enfilade.json"  # the extra file with `notes`
# What torch notes at each node for its own debugging: Python stacks, with the paths of this machine
STACKS = ("stack_trace", "source_fn_stack", "from_node", "custom")


def to_archive(predictor: Predictor) -> tuple[bytes, dict[str, Any]]:
    """The predictor's network as an archive, and its `notes`. Raises UserError where that cannot be done."""
    try:
        program, outputs = trace(predictor)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                for key in STACKS:
                    node.meta.pop(key, None)
        told = notes(predictor, program, outputs)
        program.example_inputs = None  # a pickle of noise
        buffer = io.BytesIO()
        with quiet():
            torch.export.save(program, buffer, extra_files={NOTES: json.dumps(told)})
    except Exception as error:  # torch's exporter raises many kinds
        raise cannot(predictor, "torch", error) from error
    return buffer.getvalue(), told


def notes(predictor: Predictor, program: torch.export.ExportedProgram, outputs: list[str]) -> dict[str, Any]:
    """`description`, and the inputs and outputs in order: name, sizes (a name where free), meaning."""
    inputs = [{"name": k, "shape": list(AXES[k]), "about": ABOUT[k]} for k in inputs_of(predictor.network)]
    nodes: Any = program.graph.output_node().args[0]
    made = [node.meta["val"] for node in nodes]
    answered = []
    for name, value in zip(outputs, made):
        axes = [n if isinstance(n, int) else str(n) for n in value.shape]
        answered.append({"name": name, "shape": output_axes(name, axes), "about": ABOUT[name]})
    return description(predictor) | {"inputs": inputs, "outputs": answered}


def runner(data: bytes) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A function that runs an archive, loaded again. Raises UserError where torch cannot load it."""
    try:
        with quiet():
            module = torch.export.load(io.BytesIO(data)).module()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torch cannot load what it exported, and it was not written: {reason}") from error

    @torch.inference_mode()
    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [x.numpy() for x in module(*(torch.from_numpy(x) for x in feed.values()))]

    return run
