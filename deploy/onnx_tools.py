"""What an ONNX file of ours holds: the oldest format its graph allows, and nothing of the machine that made it."""

from __future__ import annotations

from typing import Any


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
