"""ONNX files: their metadata, and the oldest format that their graph allows. Only `tidy` and `write` need onnx."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from deploy.config import Metadata


def read_properties(properties: dict[str, str]) -> dict[str, Any]:
    """Return an ONNX file's properties from JSON; a property of a foreign file that is not JSON is left out."""
    values = {}
    for key, value in properties.items():
        with contextlib.suppress(ValueError, RecursionError):
            values[key] = json.loads(value)
    return values


def write(model: Any, metadata: Metadata, file: Path) -> None:
    """Write an onnx.ModelProto with our metadata and nothing of the machine that made it."""
    import onnx

    tidy(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.to_json().items()})
    onnx.save(model, file)


def tidy(model: Any) -> None:
    """Bring an onnx.ModelProto to the oldest IR version and the opsets it uses, and drop what exporters add.

    onnxruntime 1.17 reads IR 9 and older, and refuses opset imports it does not know, used or not. The exporter keeps
    source lines and absolute paths of the user's model at every node.
    """
    import onnx

    graphs = [model.graph]
    used = set()
    while graphs:
        graph = graphs.pop()
        for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
        for node in graph.node:
            used.add(node.domain or "")
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            graphs += [inner for attribute in node.attribute for inner in attribute.graphs]
    opsets = [(opset.domain, opset.version) for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in opsets)
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ClearField("doc_string")
