"""Test requests of the Open Inference Protocol, Triton's extensions of it, and rules of HTTP."""

import dataclasses
import gzip
import json
import struct

import numpy as np
import pytest
from serving import INFER, NAMES, ONE, RAW, SHAPE, ask, binary, error_of, in_process, numbers, of, tensor

from deploy.runtimes import RunOn, load
from deploy.server.app import Limits, accepts_gzip
from deploy.server.protocol import JSON_LIMIT, RequestError, parse_infer, unpack, write_infer

IMAGES = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), dtype=np.uint8)
IMAGE = IMAGES[0]


@pytest.fixture(scope="module")
def site(artefact):
    with in_process(artefact) as client:
        yield client


@pytest.fixture(scope="module")
def expected(artefact):
    """Return the logits of IMAGES."""
    return load(artefact, RunOn("cpu")).run(IMAGES)


def parse(request, raw=b"", header_length=None):
    text = json.dumps(request).encode()
    return parse_infer(text + raw, str(len(text)) if raw else header_length, SHAPE, 8)


def refused(request, raw=b""):
    with pytest.raises(RequestError) as error:
        parse(request, raw)
    return error.value.status, error.value.message


def flat(**changes):
    return {"inputs": [tensor(data=IMAGE.ravel().tolist())]} | changes


# ---- tensors ------------------------------------------------------------------------------------------------------


def test_json_data_may_be_flat_or_nested(site, expected):
    for data in (IMAGES.ravel(), IMAGES):
        request = {"inputs": [tensor(IMAGES.shape, data=data.tolist())]}
        status, _, body = ask(site, INFER, json.dumps(request, indent=1).encode())
        assert status == 200
        logits = json.loads(body)["outputs"][0]["data"]
        np.testing.assert_allclose(logits, expected.ravel(), rtol=1e-5, atol=1e-6)


def test_a_raw_request_is_one_image_and_its_answer_is_binary(site, expected):
    status, headers, body = ask(site, INFER, IMAGE.tobytes(), RAW)
    split = int(headers["Inference-Header-Content-Length"])
    assert (status, json.loads(body[:split])["outputs"][0]["shape"]) == (200, [1, 7])
    np.testing.assert_allclose(struct.unpack("<7f", body[split:]), expected[0], rtol=1e-5, atol=1e-6)
    for wrong in (b"", IMAGE.tobytes() * 2, IMAGE.tobytes()[:-1]):
        assert ask(site, INFER, wrong, RAW)[0] == 400


@pytest.mark.parametrize("data", [
    "[1,,2]", "[1 2]", "[01]", "[1]]", "[[1], 2]", "[1,]", "{}", "1", "null", "[-1]", "[1e-1]", "[[[[1]]]]", "[]",
])  # fmt: skip
def test_data_that_does_not_fit_the_shape_is_refused(site, data):
    data = data.replace("1", ", ".join(["1"] * ONE), 1) if data not in ("1", "[1e-1]", "[-1]") else data
    text = json.dumps({"inputs": [tensor(data=0)]}).replace('"data": 0', f'"data": {data}')
    assert error_of(site, INFER, text.encode())[0] == 400


@pytest.mark.parametrize(("value", "reason"), [
    ("256", "has 256;"), ("-1", "has -1;"), ("0.5", "has 0.5;"), ("1e400", "has inf;"), ('"1"', "has '1';"),
    ("null", "has null;"), ("true", "has true;"), ("false", "has false;"), ("NaN", "NaN is not valid JSON"),
    ("Infinity", "Infinity is not valid JSON"), ("-Infinity", "-Infinity is not valid JSON"),
])  # fmt: skip
def test_a_value_that_is_not_a_byte_is_400_with_the_value(site, value, reason):
    text = numbers(data=[7] * (ONE - 1) + ["?"]).decode().replace('"?"', value)
    status, message = error_of(site, INFER, text.encode())
    assert (status, reason in message) == (400, True), message


def test_a_whole_number_may_be_written_as_a_float(site):
    assert ask(site, INFER, numbers(data=[1.0] * ONE))[0] == 200


def test_keys_may_have_any_order():
    data = json.dumps(IMAGE[None].tolist())
    for order in ('"data": {0}, "name": "images"', '"name": "images", "data"\n:\t{0}'):
        text = '{"id": "\\"data\\": [1]", "inputs": [{' + order + ', "datatype": "UINT8", "shape": [1, 16, 16, 3]}]}'
        asked = parse_infer(text.replace("{0}", data).encode(), None, SHAPE, 8)
        assert (asked.images[0] == IMAGE).all()
        assert asked.id == '"data": [1]'


def test_one_photograph_of_224_px_fits_in_json():
    shape = (224, 224, 3)
    for data in (np.full((1, *shape), 255), np.full(224 * 224 * 3, 255)):
        body = json.dumps({"inputs": [tensor((1, *shape), data=data.tolist())]}).encode()
        assert parse_infer(body, None, shape, 8).images.shape == (1, *shape)


def test_json_over_the_limit_is_413_with_advice():
    status, message = refused({"id": "x" * JSON_LIMIT})
    assert (status, "binary_data_size" in message) == (413, True)


# ---- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("binary_data", "false"), ("binary_data", 1), ("binary_data", None), ("classification", "2"),
    ("classification", 2.0), ("classification", True), ("classification", -1), ("a", [1]), ("a", {}),
])  # fmt: skip
def test_a_parameter_of_a_wrong_type_is_400_with_its_name(name, value):
    status, message = refused(flat(outputs=[{"name": "logits", "parameters": {name: value}}]))
    assert (status, name in message) == (400, True)


def test_parameters_of_all_types_of_the_protocol_are_accepted():
    own = {"a": "x", "b": 1, "c": True, "d": 0.5, "priority": 1, "sequence_id": 7}
    asked = parse(flat(parameters=own | {"binary_data_output": True}, id="7"))
    assert (asked.id, asked.binary, asked.classes) == ("7", True, 0)
    output = {"name": "logits", "parameters": {"binary_data": False, "classification": 3}}
    asked = parse(flat(parameters={"binary_data_output": True}, outputs=[output]))
    assert (asked.binary, asked.classes) == (False, 3)


def test_of_two_outputs_with_the_same_name_the_first_is_used():
    asked = parse(flat(outputs=[{"name": "logits"}, {"name": "logits", "parameters": {"binary_data": True}}]))
    assert not asked.binary


@pytest.mark.parametrize("where", ["input", "output"])
def test_shared_memory_is_refused(where):
    region = {"shared_memory_region": "r", "shared_memory_byte_size": ONE, "shared_memory_offset": 0}
    request = flat(outputs=[{"name": "logits", "parameters": region}]) if where == "output" else of(parameters=region)
    status, message = refused(request)
    assert (status, "shared memory is not supported" in message) == (400, True)


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "headers", "reason"), [
    (b"", {}, "not a request"),
    (b"{", {}, "not a request"),
    (b"[]", {}, "not a request"),
    (b"\xff\xfe", {}, "not a request"),
    (b"[" * 100_000, {}, "not a request"),
    (b'{"inputs": []}', {}, "not a request"),
    (b'{"inputs": [7]}', {}, "not a request"),
    (b'{"inputs": [{"name": "images"}]}', {}, "not a request"),
    (json.dumps({"inputs": [tensor(data=[1]), tensor(data=[1])]}).encode(), {}, "not a request"),
    (numbers(name="image"), {}, "unknown input 'image'"),
    (numbers(datatype="FP32"), {}, "datatype 'FP32'"),
    (numbers(shape=(1, 3, 16, 16)), {}, "shape [1, 3, 16, 16]"),
    (numbers(shape=(0, *SHAPE)), {}, "0 images"),
    (numbers(shape=(9, *SHAPE)), {}, "9 images"),
    (numbers(shape=(-1, *SHAPE)), {}, "-1 images"),
    (numbers(shape=(1.0, *SHAPE)), {}, "shape [1.0"),
    (numbers(data=[1, 2]), {}, "list of 768 numbers"),
    (json.dumps({"inputs": [tensor()]}).encode(), {}, "list of 768 numbers"),
    (json.dumps(flat(outputs=[{"name": "scores"}])).encode(), {}, "'scores'"),
    (json.dumps(flat(id=7)).encode(), {}, "id must be a string"),
    (*binary(of(), b"\0" * (ONE - 1)), "got 767"),
    (*binary(of(), b"\0" * (ONE + 1)), "got 769"),
    (*binary(of(size=7), b"\0" * ONE), "binary_data_size is 7"),
    (*binary(of(size="all"), b"\0" * ONE), "binary_data_size is the text 'all'"),
    (*binary(flat(), b"\0"), "1 bytes follow the JSON"),
    (b"{}", {"Inference-Header-Content-Length": "3"}, "the body has 2 bytes"),
    (b"{}", {"Inference-Header-Content-Length": "-1"}, "'-1'"),
    (b"{}", {"Inference-Header-Content-Length": "x"}, "'x'"),
    (b"{}", {"Content-Encoding": "gzip"}, "not valid gzip"),
    (b"{}", {"Content-Encoding": "deflate"}, "not valid deflate"),
    (bytes.fromhex("1f8b08000000000000"), {"Content-Encoding": "gzip"}, "not valid gzip"),
])  # fmt: skip
def test_a_wrong_request_is_400_with_the_reason(site, body, headers, reason):
    status, message = error_of(site, INFER, body, headers)
    assert (status, reason in message) == (400, True), message
    assert ask(site, INFER, numbers())[0] == 200


def test_an_error_quotes_only_a_short_ascii_part_of_a_request():
    for name in ("x" * 50_000, "\ud800", ["y" * 50_000], {"z": "\udfff" * 9_000}, "\x1b[31m"):
        status, message = refused({"inputs": [tensor(name=name, data=[])]})
        assert status == 400
        assert len(message) < 400
        assert message.isascii()
        assert message.isprintable()


@pytest.mark.parametrize(("path", "method", "status", "error"), [
    ("/v2/models/another/infer", "POST", 404, "another"),
    ("/v2/models/student/versions/2/infer", "POST", 404, "2"),
    ("/v2/models/another", "GET", 404, "another"),
    ("/nowhere", "GET", 404, "Not Found"),
    ("/predict", "GET", 405, "GET is not allowed here: use POST"),
    (INFER, "GET", 405, "GET is not allowed here: use POST"),
    ("/v2", "POST", 405, "POST is not allowed here: use "),
])  # fmt: skip
def test_a_wrong_path_or_method_is_an_error_in_json(site, path, method, status, error):
    got, headers, answer = ask(site, path, b"" if method == "POST" else None, method=method)
    assert got == status
    assert error in json.loads(answer)["error"]
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/v2/", "/v2/health/live/", "/predict/"])
def test_a_slash_at_the_end_does_not_redirect_to_the_host_that_the_client_names(site, path):
    response = site.get(path, headers={"Host": "evil.example"}, follow_redirects=False)
    assert (response.status_code, "location" in response.headers) == (404, False)


@pytest.mark.parametrize("path", ["", "/config", "/ready", "/stats"])
def test_a_model_is_described_with_and_without_its_version(site, path):
    assert ask(site, f"/v2/models/student{path}")[2] == ask(site, f"/v2/models/student/versions/1{path}")[2]
    assert ask(site, f"/v2/models/student/versions/2{path}")[0] == 404
    assert ask(site, f"/v2/models/another/versions/1{path}")[0] == 404


# ---- compression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("header", "accepted"), [
    ("", False), ("gzip", True), ("deflate", False), ("br, gzip", True), ("br", False), ("gzip;q=0", False),
    ("gzip; q=0.000, deflate", False), ("gzip;q=0.2, deflate;q=0.8", True), ("identity, gzip;q=0.5", True),
    ("xgzip", False), ("gzip;q=x", False), ("gzip;q=1.0", True), ("gzip;q=0.010", True), ("*;q=0", False),
])  # fmt: skip
def test_gzip_is_used_for_clients_that_accept_it(site, header, accepted):
    assert accepts_gzip(header) == accepted
    with site.stream("GET", "/metrics", headers={"Accept-Encoding": header}) as response:
        assert (response.headers.get("Content-Encoding") == "gzip") == accepted


def test_gzip_may_have_several_members_and_zeros_after_them():
    text = np.random.default_rng(0).bytes(300_000)
    members = [gzip.compress(text[start : start + 70_000]) for start in range(0, len(text), 70_000)]
    assert unpack(b"".join(members), "gzip", 300_000) == text
    assert unpack(b"".join(members) + bytes(100), "x-gzip", 300_000) == text
    for wrong, status in ((members[0][:-1], 400), (members[0] + b"x", 400), (b"".join(members) * 2, 413)):
        with pytest.raises(RequestError) as error:
            unpack(wrong, "gzip", 300_000)
        assert error.value.status == status
    with pytest.raises(RequestError) as error:
        unpack(b"", "br", 300_000)
    assert error.value.status == 415


# ---- answers ------------------------------------------------------------------------------------------------------


def test_many_logits_are_exact_in_json():
    logits = np.random.default_rng(0).normal(size=(3, 21_000)).astype(np.float32)
    logits[1, 5] = np.inf
    body, _ = write_infer(parse(flat()), logits, "student", ["x"] * 21_000)
    data = json.loads(body)["outputs"][0]["data"]
    assert data[21_005] is None
    data[21_005] = np.inf
    assert (np.array(data, dtype=np.float32).reshape(logits.shape) == logits).all()


def test_classification_is_the_same_in_json_and_in_binary(site, expected):
    output = {"name": "logits", "parameters": {"classification": 3, "binary_data": True}}
    _, headers, body = ask(site, INFER, json.dumps(flat(outputs=[output])).encode())
    raw, values = body[int(headers["Inference-Header-Content-Length"]) :], []
    while raw:
        length = int.from_bytes(raw[:4], "little")
        values, raw = [*values, raw[4 : 4 + length].decode()], raw[4 + length :]
    output["parameters"]["binary_data"] = False
    body = ask(site, INFER, json.dumps(flat(outputs=[output])).encode())[2]
    assert json.loads(body)["outputs"][0]["data"] == values
    best = np.argsort(-expected[0])[:3]
    assert values == [f"{expected[0][i]:f}:{i}:{NAMES[i]}" for i in best]


def test_logits_that_are_not_finite_are_null_in_json(artefact):
    with in_process(artefact, run=lambda images: np.full((len(images), 7), np.nan, np.float32)) as site:
        assert json.loads(ask(site, INFER, numbers())[2])["outputs"][0]["data"] == [None] * 7


def test_a_runtime_that_fails_gives_500_and_the_next_request_is_answered(artefact):
    runtime, calls = load(artefact, RunOn("cpu")), []

    def fails_once(batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return runtime.run(batch)

    with in_process(artefact, run=fails_once) as site:
        assert error_of(site, INFER, numbers()) == (500, "the runtime failed: out of memory")
        assert ask(site, INFER, numbers())[0] == 200
        statistics = json.loads(ask(site, "/v2/models/student/stats")[2])["model_stats"][0]["inference_stats"]
        assert (statistics["fail"]["count"], statistics["success"]["count"]) == (1, 1)


def test_a_body_over_the_limit_is_413_in_json(artefact):
    with in_process(artefact, dataclasses.replace(Limits(), body_mib=0.01)) as site:
        packed = gzip.compress(b"\0" * 5_000_000)
        assert len(packed) < 0.01 * 2**20
        too_large = (413, "the body is larger than 10485 bytes, the limit of this server")
        assert error_of(site, "/predict", b"\0" * 20_000) == too_large
        assert error_of(site, INFER, packed, {"Content-Encoding": "gzip"}) == too_large
        chunks = (b"\0" * 5_000 for _ in range(4))  # without a Content-Length
        assert error_of(site, "/predict", chunks, method="POST") == too_large
        assert error_of(site, "/predict", b"", {"Content-Length": "9" * 30}, method="POST") == too_large
        assert ask(site, "/v2/health/ready")[0] == 200
