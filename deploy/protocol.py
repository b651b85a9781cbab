"""The Open Inference Protocol (V2): requests and answers as pure functions of bytes, which know no server.

https://github.com/kserve/open-inference-protocol, with the binary tensors, the classification and the compression of
Triton's extensions.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any, NamedTuple

import numpy as np

from deploy.runtimes import INPUT_NAME, OUTPUT_NAME

VERSION = "1"  # of the model, as the protocol wants one


class RequestError(Exception):
    """What is wrong with a request, and the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def bad(message: str) -> RequestError:
    return RequestError(400, message)


class InferRequest(NamedTuple):
    """An inference request that was found to be whole."""

    id: str | None
    images: np.ndarray
    binary: bool  # the answer as a binary tensor
    classes: int  # 0: the logits; else that many "logit:index:label"


def parse_infer(body: bytes, header_length: str | None, shape: tuple[int, int, int], max_batch: int) -> InferRequest:
    """A V2 request: its JSON part, and binary tensors after it. Raises RequestError 400 for what is wrong."""
    if header_length is None:
        split = len(body)
    elif header_length.isascii() and header_length.isdigit() and int(header_length) <= len(body):
        split = int(header_length)
    else:
        raise bad(f"Inference-Header-Content-Length is {header_length!r}, the body has {len(body)} bytes")
    try:
        request = json.loads(body[:split])
        inputs, outputs = request["inputs"], request.get("outputs") or []
        (tensor,) = inputs
        name, datatype, given = tensor["name"], tensor["datatype"], tensor["shape"]
        options = request.get("parameters") or {}
        details = tensor.get("parameters") or {}
        wanted = [(output["name"], output.get("parameters") or {}) for output in outputs]
        size = details.get("binary_data_size")
        binary, classes = bool(options.get("binary_data_output")), 0
        for _, parameters in wanted:
            binary, classes = bool(parameters.get("binary_data", binary)), parameters.get("classification", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(
            f"not a request of the Open Inference Protocol ({type(error).__name__}: {error}): expected JSON with one "
            "input"
        ) from error
    expected = (
        f"one input {INPUT_NAME!r}, UINT8, shape [N, {shape[0]}, {shape[1]}, {shape[2]}], N from 1 to {max_batch}"
    )
    if name != INPUT_NAME:
        raise bad(f"unknown input {name!r}; expected {expected}")
    if datatype != "UINT8":
        raise bad(f"input {name!r} has datatype {datatype!r}; expected {expected}")
    if not (isinstance(given, list) and all(type(side) is int for side in given) and given[1:] == list(shape)):
        raise bad(f"input {name!r} has shape {given}; expected {expected}")
    if not 1 <= given[0] <= max_batch:
        raise bad(f"{given[0]} images in a request; expected {expected}")
    for output, _ in wanted:
        if output != OUTPUT_NAME:
            raise bad(f"unknown output {output!r}; expected {OUTPUT_NAME!r}")
    if type(classes) is not int or classes < 0:
        raise bad(f"classification is {classes!r}; expected how many classes")
    if request.get("id") is not None and not isinstance(request["id"], str):
        raise bad("id must be a string")
    count = math.prod(given)
    if size is None:
        if split != len(body):
            raise bad(f"{len(body) - split} bytes after the JSON, but input {name!r} has no binary_data_size")
        images = from_json(tensor.get("data"), given)
    else:
        if size != count or len(body) - split != count:
            raise bad(f"shape {given} needs {count} bytes; binary_data_size is {size}, {len(body) - split} came")
        images = np.frombuffer(body, np.uint8, count, split).reshape(given)
    return InferRequest(request.get("id"), images, binary, classes)


def from_json(data: Any, shape: list[int]) -> np.ndarray:
    """Numbers of a JSON tensor, flat or nested."""
    try:
        values = np.asarray(data, dtype=np.float64).reshape(shape)
        if not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
            raise ValueError("not whole numbers from 0 to 255")
    except (ValueError, TypeError) as error:
        raise bad(f"the data of input {INPUT_NAME!r} is no UINT8 tensor of shape {shape}: {error}") from error
    return values.astype(np.uint8)


def write_infer(
    request: InferRequest, logits: np.ndarray, name: str, labels: list[str]
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an answer."""
    output: dict[str, Any] = {"name": OUTPUT_NAME, "datatype": "FP32", "shape": list(logits.shape)}
    values: list[Any] = []
    if request.classes:  # the classification extension
        order = np.argsort(-logits, axis=1, kind="stable")[:, : request.classes]
        values = [f"{row[i]:f}:{i}:{labels[i]}" for row, best in zip(logits, order) for i in best]
        output |= {"datatype": "BYTES", "shape": list(order.shape)}
        encoded = [value.encode() for value in values]
        raw = b"".join(len(value).to_bytes(4, "little") + value for value in encoded)
    else:
        raw = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    answer = {"model_name": name, "model_version": VERSION, "outputs": [output]}
    if request.id is not None:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = values or [x if math.isfinite(x) else None for x in logits.ravel().tolist()]
        return json.dumps(answer).encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps(answer).encode()
    return header + raw, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """A body in its Content-Encoding, unpacked to at most limit bytes; RequestError 413 where it is larger."""
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestError(415, f"Content-Encoding {encoding!r}; expected gzip, deflate or none")
    try:
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        body = unpacker.decompress(body, limit + 1)
        if len(body) > limit:
            raise too_large(limit)
        if not unpacker.eof:
            raise zlib.error("it ends too early")
    except zlib.error as error:
        raise bad(f"the body is no {encoding}: {error}") from error
    return body


def too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes, the limit of this server")


def pack(body: bytes, headers: dict[str, str], accepted: str) -> tuple[bytes, dict[str, str]]:
    """gzip or deflate, where the client takes it and it is worth it."""
    for encoding, bits in (("gzip", 31), ("deflate", 15)):
        if encoding in accepted and len(body) > 1024:
            packer = zlib.compressobj(1, wbits=bits)
            return packer.compress(body) + packer.flush(), headers | {"Content-Encoding": encoding}
    return body, headers
