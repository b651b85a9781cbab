"""What the Open Inference Protocol, Triton's extensions and the RFCs say of a request; what is posted to /predict."""

import gzip
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, features
from serving import INFER, ONE, SHAPE, ask, of, server, tensor

from deploy.runtimes import load
from deploy.server.app import accepts_gzip
from deploy.server.protocol import RequestError, parse_infer, unpack, write_infer

IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
LOGITS = np.linspace(-1, 1, 7, dtype=np.float32)[None]


@pytest.fixture(scope="module")
def port(artefact):
    with server(artefact) as (_, port):
        yield port


def parse(request, raw=b"", header_length=None):
    text = json.dumps(request).encode()
    return parse_infer(text + raw, str(len(text)) if raw else header_length, SHAPE, 8)


def refused(request, raw=b""):
    with pytest.raises(RequestError) as error:
        parse(request, raw)
    return error.value.status, error.value.message


def flat(**changes):
    return {"inputs": [tensor(data=IMAGE.ravel().tolist())]} | changes


def test_a_raw_request_is_one_image_and_its_answer_is_binary(port, artefact):
    status, headers, body = ask(port, INFER, IMAGE.tobytes(), {"Inference-Header-Content-Length": "0"})
    split = int(headers["Inference-Header-Content-Length"])
    assert (status, json.loads(body[:split])["outputs"][0]["shape"]) == (200, [1, 7])
    logits = struct.unpack("<7f", body[split:])
    np.testing.assert_allclose([logits], load(artefact).run(IMAGE[None]), rtol=1e-5, atol=1e-6)
    for wrong in (b"", IMAGE.tobytes() * 2, IMAGE.tobytes()[:-1]):
        assert ask(port, INFER, wrong, {"Inference-Header-Content-Length": "0"})[0] == 400


@pytest.mark.parametrize("path", ["", "/config", "/ready", "/stats"])
def test_what_a_model_tells_it_tells_by_version_too(port, path):
    assert ask(port, f"/v2/models/student{path}")[2] == ask(port, f"/v2/models/student/versions/1{path}")[2]
    assert ask(port, f"/v2/models/student/versions/2{path}")[0] == 404
    assert ask(port, f"/v2/models/another/versions/1{path}")[0] == 404


@pytest.mark.parametrize(("name", "value"), [
    ("binary_data", "false"), ("binary_data", 1), ("binary_data", None), ("classification", "2"),
    ("classification", 2.0), ("classification", True), ("classification", -1), ("a", [1]), ("a", {}),
])  # fmt: skip
def test_a_parameter_of_another_type_is_refused_by_name(name, value):
    status, message = refused(flat(outputs=[{"name": "logits", "parameters": {name: value}}]))
    assert (status, name in message) == (400, True)


def test_the_types_of_the_protocol_are_taken():
    own = {"a": "x", "b": 1, "c": True, "d": 0.5, "priority": 1, "sequence_id": 7}
    asked = parse(flat(parameters=own | {"binary_data_output": True}, id="7"))
    assert (asked.id, asked.binary, asked.classes) == ("7", True, 0)
    output = {"name": "logits", "parameters": {"binary_data": False, "classification": 3}}
    asked = parse(flat(parameters={"binary_data_output": True}, outputs=[output]))
    assert (asked.binary, asked.classes) == (False, 3)


def test_an_output_asked_for_twice_is_as_it_was_asked_for_first():
    asked = parse(flat(outputs=[{"name": "logits"}, {"name": "logits", "parameters": {"binary_data": True}}]))
    assert not asked.binary


@pytest.mark.parametrize("where", ["input", "output"])
def test_shared_memory_is_refused(where):
    region = {"shared_memory_region": "r", "shared_memory_byte_size": ONE, "shared_memory_offset": 0}
    request = flat(outputs=[{"name": "logits", "parameters": region}]) if where == "output" else of(parameters=region)
    assert refused(request) == (400, "shared memory is not supported: send and receive tensors in the body")


def test_the_order_of_keys_is_free():
    data = json.dumps(IMAGE[None].tolist())
    for order in ('"data": {0}, "name": "images"', '"name": "images", "data"\n:\t{0}'):
        text = '{"id": "\\"data\\": [1]", "inputs": [{' + order + ', "datatype": "UINT8", "shape": [1, 16, 16, 3]}]}'
        asked = parse_infer(text.replace("{0}", data).encode(), None, SHAPE, 8)
        assert (asked.images[0] == IMAGE).all()
        assert asked.id == '"data": [1]'


def test_what_an_error_repeats_is_cut_and_can_be_written():
    for name in ("x" * 50_000, "\ud800", ["y" * 50_000], {"z": "\udfff" * 9_000}):
        status, message = refused({"inputs": [tensor(name=name, data=[])]})
        assert status == 400
        assert len(message.encode()) < 400


@pytest.mark.parametrize(("header", "accepted"), [
    ("", False), ("gzip", True), ("deflate", False), ("br, gzip", True), ("br", False), ("gzip;q=0", False),
    ("gzip; q=0.000, deflate", False), ("gzip;q=0.2, deflate;q=0.8", True), ("identity, gzip;q=0.5", True),
    ("xgzip", False), ("gzip;q=x", False), ("gzip;q=1.0", True), ("gzip;q=0.010", True), ("*;q=0", False),
])  # fmt: skip
def test_gzip_is_used_for_clients_that_accept_it(header, accepted):
    assert accepts_gzip(header) == accepted


def test_gzip_may_have_several_members_and_zeros_after_them():
    text = np.random.default_rng(0).bytes(300_000)
    members = [gzip.compress(text[start : start + 70_000]) for start in range(0, len(text), 70_000)]
    assert unpack(b"".join(members), "gzip", 300_000) == text
    assert unpack(b"".join(members) + bytes(100), "x-gzip", 300_000) == text
    for wrong, status in ((members[0][:-1], 400), (members[0] + b"x", 400), (b"".join(members) * 2, 413)):
        with pytest.raises(RequestError) as error:
            unpack(wrong, "gzip", 300_000)
        assert error.value.status == status


def test_many_logits_are_written_as_json_reads_them():
    logits = np.random.default_rng(0).normal(size=(3, 21_000)).astype(np.float32)
    logits[1, 5] = np.inf
    body, _ = write_infer(parse(flat()), logits, "student", ["x"] * 21_000)
    told = json.loads(body)["outputs"][0]["data"]
    assert told[21_005] is None
    told[21_005] = np.inf
    assert (np.array(told, dtype=np.float32).reshape(logits.shape) == logits).all()


# ---- /predict -----------------------------------------------------------------------------------------------------


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF"])
def test_predict_reads_what_pillow_reads(port, kind):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    status, _, body = ask(port, "/predict", picture(kind))
    assert (status, len(json.loads(body)["predictions"])) == (200, 5)


def form(*parts, boundary="b0"):
    lines = [b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), about, content)
             for about, content in parts]  # fmt: skip
    return b"".join(lines) + b"--%s--\r\n" % boundary.encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def test_predict_takes_a_form_with_one_file(port):
    expected = ask(port, "/predict", picture("PNG"))[2]
    photo = b'name="image"; filename="a.png"', picture("PNG")
    for parts in ([photo], [(b'name="note"', b"hello"), photo, (b'name="top"', b"3")]):
        assert ask(port, "/predict", *form(*parts))[2] == expected


@pytest.mark.parametrize(("body", "headers", "said"), [
    (*form((b'name="a"; filename="a"', b"1"), (b'name="b"; filename="b"', b"2")), "2 files"),
    (*form((b'name="a"', b"1")), "0 files"),
    (*form(*[(b'name="a"', b"1")] * 200), "form"),
    (b"nonsense", {"Content-Type": "multipart/form-data; boundary=b0"}, "form"),
    (b"nonsense", {"Content-Type": "multipart/form-data"}, "boundary"),
    (b"nonsense", {"Content-Type": "multipart/mixed; boundary=b0"}, "form-data"),
    (*form((b'name="a"; filename="a"', b"no image")), "not an image"),
    (b'{"image": "aGVsbG8="}', {"Content-Type": "application/json"}, "send the file as it is"),
])  # fmt: skip
def test_a_form_that_holds_no_one_image_says_what_was_expected(port, body, headers, said):
    status, _, answer = ask(port, "/predict", body, headers)
    assert (status, said in json.loads(answer)["error"]) == (400, True), answer
