"""The Open Inference Protocol (V2): requests and answers as pure functions of bytes, which know no server.

https://github.com/kserve/open-inference-protocol, with the binary tensors, the raw binary requests, the classification
and the compression of Triton's extensions.

No request is taken at its word: the numbers of a JSON tensor are counted before they are read, what else there is of
JSON may have JSON_LIMIT bytes, and what an error message repeats is cut. Long work goes piece by piece, so that another
thread gets the interpreter in between.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import secrets
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deploy.runtimes import INPUT_NAME, OUTPUT_NAME

VERSION = "1"  # of the model, as the protocol wants one
JSON_LIMIT = 2**16  # bytes of a request's JSON beside the numbers of its tensor
PIECE = 2**16  # bytes of numbers that are read, or numbers that are written, without a pause: about a millisecond
GZIP_MEMBERS = 1000  # of one body
DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
ELSEWHERE = secrets.token_hex(16)  # stands in the JSON for numbers that were cut out of it


class RequestError(Exception):
    """What is wrong with a request, and the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def __reduce__(self) -> Any:  # from one process to another
        return type(self), (self.status, self.message)


def bad(message: str) -> RequestError:
    return RequestError(400, message)


class InferRequest(NamedTuple):
    """An inference request that was found to be whole."""

    id: str | None
    images: np.ndarray
    binary: bool  # the answer as a binary tensor
    classes: int  # 0: the logits; else that many "logit:index:label"


def show(value: Any) -> str:
    """What a request said, as an error message repeats it: short, and in characters that can be written."""
    text = ascii(value[:100] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def whole_number(text: str) -> int | None:
    """Of a header or a query; None where it is none. A number of thousands of digits is no number here."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def parse_infer(body: bytes, header_length: str | None, shape: tuple[int, int, int], max_batch: int) -> InferRequest:
    """A V2 request: its JSON part, and binary tensors after it; or one image's bytes and nothing else, where the
    header's length is 0. Raises RequestError 400 for what is wrong, and costs time in proportion to the body's size.
    """
    split = len(body) if header_length is None else whole_number(header_length)
    if split is None or split > len(body):
        raise bad(f"Inference-Header-Content-Length is {show(header_length)}, the body has {len(body)} bytes")
    if split == 0 and header_length is not None:
        count = math.prod(shape)
        if len(body) != count:
            raise bad(f"a raw request holds one image, {count} bytes; {len(body)} came")
        return InferRequest(None, np.frombuffer(body, np.uint8).reshape(1, *shape), True, 0)
    expected = (
        f"one input {INPUT_NAME!r}, UINT8, shape [N, {shape[0]}, {shape[1]}, {shape[2]}], N from 1 to {max_batch}"
    )
    text, numbers = cut_numbers(body[:split])
    if len(text) > JSON_LIMIT:
        raise bad(
            f"not a request of the Open Inference Protocol: {len(text)} bytes of JSON beside the numbers of a tensor; "
            f"{JSON_LIMIT} may be"
        )
    try:
        request = json.loads(text)
        (tensor,) = request["inputs"]
        name, datatype, given = tensor["name"], tensor["datatype"], tensor["shape"]
        wanted = [(output["name"], parameters_of(output)) for output in request.get("outputs") or []]
        options, details = parameters_of(request), parameters_of(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(
            f"not a request of the Open Inference Protocol ({type(error).__name__}: {show(str(error))}): expected JSON "
            "with one input"
        ) from error
    if name != INPUT_NAME:
        raise bad(f"unknown input {show(name)}; expected {expected}")
    if datatype != "UINT8":
        raise bad(f"input {name!r} has datatype {show(datatype)}; expected {expected}")
    if not (isinstance(given, list) and all(type(side) is int for side in given) and given[1:] == list(shape)):
        raise bad(f"input {name!r} has shape {show(given)}; expected {expected}")
    if not 1 <= given[0] <= max_batch:
        raise bad(f"{show(given[0])} images in a request; expected {expected}")
    if any(output != OUTPUT_NAME for output, _ in wanted):
        raise bad(f"unknown output {show([output for output, _ in wanted])}; expected {OUTPUT_NAME!r}")
    output = wanted[0][1] if wanted else {}  # asked for again, it is not sent again, as in Triton
    for parameters in (details, *(parameters for _, parameters in wanted)):
        if any(key.startswith("shared_memory") for key in parameters):
            raise bad("shared memory is not served: send and receive tensors in the body")
    binary = parameter(output, "binary_data", bool, parameter(options, "binary_data_output", bool, False))
    classes = parameter(output, "classification", int, 0)
    if classes < 0:
        raise bad(f"classification is {show(classes)}; expected how many classes")
    if request.get("id") is not None and not isinstance(request["id"], str):
        raise bad("id must be a string")
    count, size = math.prod(given), details.get("binary_data_size")
    if size is None:
        if split != len(body):
            raise bad(f"{len(body) - split} bytes after the JSON, but input {name!r} has no binary_data_size")
        if numbers is None or tensor.get("data") != ELSEWHERE:
            raise bad(f"input {name!r} is no UINT8 tensor: its data must be {count} numbers")
        images = from_json(numbers, given)
    else:
        if type(size) is not int or size != count or len(body) - split != count:
            said = show(size).strip("'") + " as text" * isinstance(size, str)
            raise bad(f"shape {given} needs {count} bytes; binary_data_size is {said}, {len(body) - split} came")
        images = np.frombuffer(body, np.uint8, count, split).reshape(given)
    return InferRequest(request.get("id"), images, binary, classes)


def parameters_of(part: Any) -> dict[str, Any]:
    """The parameters of a request, an input or an output: strings, numbers and booleans by name."""
    parameters = part.get("parameters")
    parameters = {} if parameters is None else parameters
    for key, value in parameters.items():
        if not isinstance(value, (str, int, float)):
            raise TypeError(f"parameter {show(key)} is {show(value)}")
    return parameters


def parameter(parameters: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """One of them, which must be of the kind that the protocol says."""
    value = parameters.get(name, default)
    if value is not default and type(value) is not kind:
        raise bad(f"{name} is {show(value)}; expected {'true or false' if kind is bool else 'a whole number'}")
    return value


def cut_numbers(text: bytes) -> tuple[bytes, bytes | None]:
    """A request's JSON without the numbers of its tensor, and these: "[1, 2]" or "[[1], [2]]"."""
    found = DATA.search(text, 0, JSON_LIMIT)  # the rest of the JSON is no longer than that
    if not found:
        return text, None
    start = found.end()
    ends = [end for end in (text.find(b'"', start), text.find(b"}", start)) if end >= 0]
    end = text.rfind(b"]", start, min(ends, default=len(text))) + 1
    if not end:
        return text, None
    return text[:start] + b'"' + ELSEWHERE.encode() + b'"' + text[end:], text[start:end]


def from_json(text: bytes, shape: list[int]) -> np.ndarray:
    """The numbers of a JSON tensor -> uint8 of that shape. They may be flat, or nested."""
    count = math.prod(shape)
    try:
        brackets = b"".join(
            text[i : i + 2**20].translate(None, b"0123456789+-.eE \t\r\n") for i in range(0, len(text), 2**20)
        )
        if all(brackets != nested for nested in nestings(shape)):
            raise ValueError(f"{brackets.count(b',') + 1} values, not nested as the shape says")
        values = np.empty(count, np.uint8)
        first = 0
        for piece in pieces(text):
            if len(piece) > 2 * PIECE:
                raise ValueError(f"a number of {len(piece)} characters")
            flat = piece.translate(bytes.maketrans(b"[]", b"  "))
            numbers = np.asarray(json.loads(b"[" + flat + b"]"), dtype=np.float64)
            if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
                raise ValueError("not whole numbers from 0 to 255")
            values[first : first + len(numbers)] = numbers
            first += len(numbers)
    except (ValueError, TypeError, OverflowError) as error:
        raise bad(
            f"the data of input {INPUT_NAME!r} is no UINT8 tensor of shape {shape}: {show(str(error))}"
        ) from error
    return values.reshape(shape)


def nestings(shape: list[int]) -> Iterator[bytes]:
    """The brackets and commas of a JSON tensor: flat, or nested as the shape says, some neighbouring sides as one."""
    for apart in itertools.product((False, True), repeat=len(shape) - 1):
        sides = shape[:1]
        for side, is_apart in zip(shape[1:], apart):
            sides = [*sides, side] if is_apart else [*sides[:-1], sides[-1] * side]
        text = b"[" + b"," * (sides[-1] - 1) + b"]"
        for side in reversed(sides[:-1]):
            text = b"[" + b",".join([text] * side) + b"]"
        yield text


def pieces(text: bytes) -> Iterator[bytes]:
    """Numbers between commas, in parts of at least PIECE bytes."""
    start = 0
    while (end := text.find(b",", start + PIECE)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def write_infer(
    request: InferRequest, logits: np.ndarray, name: str, labels: list[str]
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an answer."""
    output: dict[str, Any] = {"name": OUTPUT_NAME, "datatype": "FP32", "shape": list(logits.shape)}
    values: list[str] = []
    if request.classes:  # the classification extension
        order = np.argsort(-logits, axis=1, kind="stable")[:, : request.classes]
        values = [f"{row[i]:f}:{i}:{labels[i]}" for row, best in zip(logits, order) for i in best]
        output |= {"datatype": "BYTES", "shape": list(order.shape)}
        encoded = [value.encode() for value in values]
        raw = b"".join(len(value).to_bytes(4, "little") + value for value in encoded)
    else:
        raw = np.ascontiguousarray(logits, dtype="<f4").tobytes()
    answer: dict[str, Any] = {"model_name": name, "model_version": VERSION}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = [output]
    if request.binary:
        output["parameters"] = {"binary_data_size": len(raw)}
        header = json.dumps(answer).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
        return header + raw, headers
    text = json.dumps(answer).removesuffix("}]}")
    data = ",".join(map(json.dumps, values) if request.classes else json_numbers(logits))
    return f'{text}, "data": [{data}]}}]}}'.encode(), {"Content-Type": "application/json"}


def json_numbers(values: np.ndarray) -> Iterator[str]:
    """In parts; null for what is not finite."""
    flat = values.ravel()
    for first in range(0, len(flat), PIECE // 16):
        yield ",".join(repr(x) if math.isfinite(x) else "null" for x in flat[first : first + PIECE // 16].tolist())


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """A body in its Content-Encoding, unpacked to at most limit bytes; RequestError 413 where it is larger."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise RequestError(415, f"Content-Encoding {show(encoding)}; expected gzip, deflate or none")
    unpacked: list[bytes] = []
    position = size = members = 0
    try:
        while position < len(body):  # a gzip file is one member, or several, and perhaps zeros
            if members and not body[position] and body.count(b"\0", position) == len(body) - position:
                break
            members += 1
            if members > GZIP_MEMBERS:
                raise zlib.error(f"more than {GZIP_MEMBERS} members")
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
            while not unpacker.eof:
                piece = body[position : position + PIECE]
                if not piece:
                    raise zlib.error("it ends too early")
                unpacked.append(unpacker.decompress(piece, limit + 1 - size))
                position += len(piece) - len(unpacker.unused_data) - len(unpacker.unconsumed_tail)
                size += len(unpacked[-1])
                if size > limit:
                    raise too_large(limit)
    except zlib.error as error:
        raise bad(f"the body is no {encoding}: {error}") from error
    if not members:
        raise bad(f"the body is no {encoding}: it is empty")
    return b"".join(unpacked)


def too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes, the limit of this server")


def pack(body: bytes, headers: dict[str, str], accepted: str) -> tuple[bytes, dict[str, str]]:
    """gzip or deflate, where the client takes it (RFC 9110, 12.5.3) and it is worth it."""
    weights = accepted_codings(accepted)
    weight, encoding = max((weights.get(name, weights.get("*", 0.0)), name) for name in ("deflate", "gzip"))
    if weight <= 0 or weight < weights.get("identity", 0.0) or len(body) <= 1024:
        return body, headers
    packer = zlib.compressobj(1, wbits=31 if encoding == "gzip" else 15)
    return packer.compress(body) + packer.flush(), headers | {"Content-Encoding": encoding}


def accepted_codings(header: str) -> dict[str, float]:
    """Of an Accept-Encoding header: each coding's weight; what is not a weight counts as 0."""
    weights = {}
    for part in header.lower().split(","):
        coding, _, weight = (field.strip() for field in part.partition(";"))
        said = re.fullmatch(r"q\s*=\s*([01](?:\.[0-9]{0,3})?)", weight)
        weights[coding] = float(said[1]) if said else float(not weight)
    return weights
