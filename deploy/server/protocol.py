"""Parse the bytes of requests of the Open Inference Protocol (V2), and write the bytes of responses.

https://github.com/kserve/open-inference-protocol, with Triton's extensions: binary tensors, raw binary requests,
classification and compressed requests. Sizes are checked before the bytes are read. An error message repeats at most
100 characters of a request.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.runtimes import INPUT_NAME, OUTPUT_NAME

VERSION = "1"  # the protocol requires a version of the model
JSON_LIMIT = 2**20  # largest JSON of a request, in bytes: json.loads holds the interpreter lock until it ends
LISTS = 2**17  # largest number of lists and objects in it: a nested image of 224 px has 50,401 lists
GZIP_MEMBERS = 1000  # largest number of members in a body: even an empty member takes some microseconds
Shape = tuple[int, ...]


@dataclass(eq=False)
class RequestError(Exception):
    """Report an error in a request: the HTTP status and the message of its response."""

    status: int
    message: str


def bad(message: str) -> RequestError:
    return RequestError(400, message)


@dataclass(frozen=True)
class InferRequest:
    """Hold a valid inference request."""

    id: str | None
    images: np.ndarray  # uint8 (N, H, W, 3)
    binary: bool  # respond with a binary tensor
    classes: int  # 0: respond with logits; N: with "logit:index:label" for the N best classes


def show(value: Any) -> str:
    """Return the text of a request's value for an error message: at most 100 ASCII characters."""
    text = ascii(value[:100] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def whole_number(text: str) -> int | None:
    """Return the non-negative integer of a text of at most 18 digits; return None for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


# ---- requests -----------------------------------------------------------------------------------------------------


def parse_infer(body: bytes, header_length: str | None, shape: Shape, max_batch: int) -> InferRequest:
    """Parse the body of an inference request.

    Args:
        body: JSON, then the binary tensor if the request has one; only the bytes of one image if header_length is "0"
        header_length: the header Inference-Header-Content-Length, which gives the number of bytes of the JSON
        shape: (H, W, 3) of an image
        max_batch: the largest number of images in a request

    Raises:
        RequestError: the request is not valid
    """
    split = len(body) if header_length is None else whole_number(header_length)
    if split is None or split > len(body):
        raise bad(f"Inference-Header-Content-Length is {show(header_length)}, but the body has {len(body)} bytes")
    if header_length is not None and split == 0:
        return InferRequest(None, read_binary(body, (1, *shape), "the image of a raw request"), True, 0)
    request = read_json(body[:split])
    try:
        (tensor,) = request["inputs"]
        outputs = [(output["name"], parameters_of(output)) for output in request.get("outputs") or []]
        options, details, given = parameters_of(request), parameters_of(tensor), read_shape(tensor, shape, max_batch)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_a_request(error) from error
    if any(name != OUTPUT_NAME for name, _ in outputs):
        raise bad(f"unknown output {show([name for name, _ in outputs])}; expected {OUTPUT_NAME!r}")
    for parameters in (details, *(parameters for _, parameters in outputs)):
        if any(key.startswith("shared_memory") for key in parameters):
            raise bad("shared memory is not supported: send and receive tensors in the body")
    output = outputs[0][1] if outputs else {}  # a second output of the same name is ignored, as in Triton
    binary = parameter(output, "binary_data", bool, parameter(options, "binary_data_output", bool, False))
    classes = parameter(output, "classification", int, 0)
    if classes < 0:
        raise bad(f"classification is {show(classes)}; expected a number of classes")
    if not isinstance(request.get("id"), (str, type(None))):
        raise bad("id must be a string")
    if (size := details.get("binary_data_size")) is None:
        if split != len(body):
            raise bad(f"{len(body) - split} bytes follow the JSON, but {INPUT_NAME!r} has no binary_data_size")
        images = read_numbers(tensor.get("data"), given)
    elif type(size) is not int or size != math.prod(given):
        found = "the text " * isinstance(size, str) + show(size)
        raise bad(f"shape {list(given)} needs {math.prod(given)} bytes; binary_data_size is {found}")
    else:
        images = read_binary(body[split:], given, f"shape {list(given)}")
    return InferRequest(request.get("id"), images, binary, classes)


def read_json(text: bytes) -> Any:
    if len(text) > JSON_LIMIT:
        raise RequestError(
            413,
            f"the JSON has {len(text)} bytes; at most {JSON_LIMIT} are read. Send a larger tensor as binary data: "
            "binary_data_size in its parameters, and the bytes after the JSON",
        )
    if text.count(b"[") + text.count(b"{") > LISTS:
        raise RequestError(413, f"the JSON has more than {LISTS} lists and objects")
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise not_a_request(error) from error


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def not_a_request(error: Exception) -> RequestError:
    reason = f"{type(error).__name__}: {show(str(error))}"
    return bad(f"not a request of the Open Inference Protocol ({reason}); expected JSON with one input")


def read_shape(tensor: dict[str, Any], shape: Shape, max_batch: int) -> Shape:
    """Return (N, H, W, 3) after all checks of an input's name, type and shape."""
    name, datatype, given = tensor["name"], tensor["datatype"], tensor["shape"]
    height, width, channels = shape
    expected = f"one input {INPUT_NAME!r}, UINT8, shape [N, {height}, {width}, {channels}], N from 1 to {max_batch}"
    if name != INPUT_NAME:
        raise bad(f"unknown input {show(name)}; expected {expected}")
    if datatype != "UINT8":
        raise bad(f"input {name!r} has datatype {show(datatype)}; expected {expected}")
    if not (isinstance(given, list) and all(type(side) is int for side in given) and given[1:] == list(shape)):
        raise bad(f"input {name!r} has shape {show(given)}; expected {expected}")
    if not 1 <= given[0] <= max_batch:
        raise bad(f"the request has {show(given[0])} images; expected {expected}")
    return tuple(given)


def parameters_of(part: Any) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output: strings, numbers and booleans by name."""
    parameters = part.get("parameters")
    parameters = {} if parameters is None else parameters
    for key, value in parameters.items():
        if not isinstance(value, (str, int, float)):
            raise TypeError(f"parameter {show(key)} is {show(value)}")
    return parameters


def parameter(parameters: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = parameters.get(name, default)
    if value is not default and type(value) is not kind:
        raise bad(f"{name} is {show(value)}; expected {'true or false' if kind is bool else 'an integer'}")
    return value


def read_binary(raw: bytes, shape: Shape, name: str) -> np.ndarray:
    if len(raw) != math.prod(shape):
        raise bad(f"{name} needs {math.prod(shape)} bytes; got {len(raw)}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def read_numbers(data: Any, shape: Shape) -> np.ndarray:
    """Return the numbers of a JSON tensor as uint8 of the given shape. They may be flat, or nested as the shape."""
    flat = isinstance(data, list) and len(data) == math.prod(shape)
    values = [data]
    for side in (math.prod(shape),) if flat else shape:
        # a generator, not numpy, so that other threads get the interpreter lock in between
        if not all(type(row) is list and len(row) == side for row in values):
            raise bad(
                f"the data of input {INPUT_NAME!r} must be a list of {math.prod(shape)} numbers, flat or nested as its "
                f"shape {list(shape)}"
            )
        values = list(itertools.chain.from_iterable(values))
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= 255 or value != int(value):
            found = show(value) if type(value) in (int, float, str) else json.dumps(value)[:20]
            raise bad(f"the data of input {INPUT_NAME!r} has {found}; expected integers from 0 to 255")
    return np.array(values, np.uint8).reshape(shape)


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """Return the decompressed body. Raise RequestError 413 if it has more than `limit` bytes."""
    try:
        if encoding == "deflate":
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads gzip too: some clients send it as deflate
            unpacked = unpacker.decompress(body, limit + 1)
            if not unpacker.eof and len(unpacked) <= limit:
                raise EOFError("the data ends too early")
        elif encoding in ("gzip", "x-gzip"):
            if body.count(b"\x1f\x8b\x08") > GZIP_MEMBERS:
                raise zlib.error(f"more than {GZIP_MEMBERS} members")
            unpacked = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit + 1)
        else:
            raise RequestError(415, f"Content-Encoding is {show(encoding)}; expected gzip, deflate or none")
    except (OSError, EOFError, zlib.error) as error:
        raise bad(f"the body is not valid {encoding}: {show(str(error))}") from error
    if len(unpacked) > limit:
        raise too_large(limit)
    return unpacked


def too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes, the limit of this server")


# ---- responses ----------------------------------------------------------------------------------------------------


def write_infer(
    request: InferRequest, logits: np.ndarray, name: str, labels: list[str]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the response to an inference request."""
    output: dict[str, Any] = {"name": OUTPUT_NAME, "datatype": "FP32", "shape": list(logits.shape)}
    values: list[str] = []
    if request.classes:  # the classification extension
        order = np.argsort(-logits, axis=1, kind="stable")[:, : request.classes]
        values = [f"{row[i]:f}:{i}:{labels[i]}" for row, best in zip(logits, order) for i in best]
        output |= {"datatype": "BYTES", "shape": list(order.shape)}
    response: dict[str, Any] = {"model_name": name, "model_version": VERSION}
    response |= {} if request.id is None else {"id": request.id}
    response["outputs"] = [output]
    if not request.binary:
        # not json.dumps, which holds the interpreter lock until it ends; null stands for a number that is not finite
        numbers = (repr(x) if math.isfinite(x) else "null" for x in logits.ravel().tolist())
        data = ", ".join(map(json.dumps, values) if request.classes else numbers)
        text = json.dumps(response).removesuffix("}]}")
        return f'{text}, "data": [{data}]}}]}}'.encode(), {"Content-Type": "application/json"}
    if request.classes:
        encoded = [value.encode() for value in values]
        raw = b"".join(len(value).to_bytes(4, "little") + value for value in encoded)
    else:
        raw = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps(response).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return header + raw, headers
