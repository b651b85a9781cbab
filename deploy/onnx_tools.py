"""Parse the metadata of ONNX files, reject references to other files, and write files. Only `write` needs onnx."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.cli import UserError
from deploy.config import Metadata

# The fields of ONNX's protobuf messages that lead to a tensor: number -> message.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
MAX_DEPTH = 100  # maximum depth of nested messages, as in protobuf


def refuse_external_data(content: bytes, path: Path) -> None:
    """Raise UserError if an ONNX file names other files for its weights; some versions of onnxruntime read them.

    Such a file could name /etc/passwd. A device has no onnx package, so this module parses the messages itself.
    """
    try:
        external = has_external_data(memoryview(content))
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a valid ONNX file: {error}") from error
    if external:
        raise UserError(f"{path} keeps weights in other files, which are not read: save it as one file")


def has_external_data(content: memoryview, message: str = "model", depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested deeper than {MAX_DEPTH}")
    if message == "tensor":
        return any(number == EXTERNAL_DATA or (number == DATA_LOCATION and value) for number, value in fields(content))
    inner = MESSAGES[message]
    parts = ((inner[number], value) for number, value in fields(content) if number in inner)
    return any(has_external_data(part, name, depth + 1) for name, part in parts if isinstance(part, memoryview))


def fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of each field of a message. A value is an integer, or a view of its bytes."""
    position = 0
    while position < len(content):
        key, position = read_varint(content, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = read_varint(content, position)
            yield number, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"field {number} has an unknown type")
        size, position = read_varint(content, position) if kind == BYTES else (8 if kind == FIXED64 else 4, position)
        if position + size > len(content):
            raise ValueError(f"field {number} is cut off")
        yield number, content[position : position + size]
        position += size


def read_varint(content: memoryview, position: int) -> tuple[int, int]:
    """Return a varint, which has 7 bits in each byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number is too long")


def read_properties(properties: dict[str, str]) -> dict[str, Any]:
    """Return an ONNX file's properties, parsed as JSON. Skip those that are not JSON: other exporters write them."""
    values = {}
    for key, value in properties.items():
        with contextlib.suppress(ValueError, RecursionError):
            values[key] = json.loads(value)
    return values


def write(model: Any, metadata: Metadata, file: Path) -> None:
    """Write an onnx.ModelProto with our metadata, and without the source paths that the exporter stores at its nodes.

    The file gets the oldest IR version that fits, because onnxruntime 1.17 reads only IR 9 and older. It imports only
    the opsets of its graphs, because onnxruntime 1.17 rejects an unknown opset even if no node uses it.
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
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.to_json().items()})
    onnx.save(model, file)
