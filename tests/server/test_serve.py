"""deploy.serve: a real server process, real clients, and every mistake a client can make."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gzip
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from serving import INFER, ONE, ROOT, SHAPE, ask, binary, of, server, tensor
from sklearn.datasets import load_sample_images

from deploy.preprocess import open_image, prepare
from deploy.runtimes import RunOn, load
from deploy.server.app import Limits, StudentServer, make_app


@pytest.fixture(scope="module")
def port(artefact):
    with server(artefact) as (_, port):
        yield port


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


# ---- the protocol, by Triton's own client -------------------------------------------------------------------------

httpclient = pytest.importorskip("tritonclient.http")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_gets_the_runtimes_logits(port, artefact, images, binary, compression):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = httpclient.InferInput("images", images.shape, "UINT8")
        given.set_data_from_numpy(images, binary_data=binary)
        answer = client.infer(
            "student", [given], outputs=[httpclient.InferRequestedOutput("logits", binary_data=binary)],
            request_id="photo 7", request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
    assert answer.get_response()["id"] == "photo 7"
    assert answer.get_response()["model_name"] == "student"
    np.testing.assert_allclose(answer.as_numpy("logits"), load(artefact).run(images), rtol=1e-5, atol=1e-6)


def test_tritonclient_without_outputs_and_by_version(port, artefact, images):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = httpclient.InferInput("images", images.shape, "UINT8")
        given.set_data_from_numpy(images)
        answers = [client.infer("student", [given]), client.infer("student", [given], model_version="1")]
        later = [client.async_infer("student", [given]) for _ in range(5)]
        answers += [request.get_result() for request in later]
    for answer in answers:
        np.testing.assert_allclose(answer.as_numpy("logits"), load(artefact).run(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_classification(port, artefact, images, binary):
    names = ["a cat", "a dog", "<b>café</b>", "d", "e", "f", "g"]
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = httpclient.InferInput("images", images.shape, "UINT8")
        given.set_data_from_numpy(images)
        outputs = [httpclient.InferRequestedOutput("logits", binary_data=binary, class_count=3)]
        answer = client.infer("student", [given], outputs=outputs).as_numpy("logits")
    logits = load(artefact).run(images)
    assert answer.shape == (3, 3)
    for row, best in zip(logits, answer):
        for index, said in zip(np.argsort(-row)[:3], best):
            value, i, label = (said.decode() if isinstance(said, bytes) else said).split(":")
            assert (int(i), label) == (index, names[index])
            assert float(value) == pytest.approx(row[index], abs=1e-5)


def test_tritonclient_asks_about_server_and_model(port):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("student")
        assert client.is_model_ready("student", "1")
        assert not client.is_model_ready("another")
        assert client.get_server_metadata()["name"] == "kdlite"
        metadata = client.get_model_metadata("student")
        assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
        assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 7]}]
        assert client.get_model_config("student")["max_batch_size"] == 8
        assert client.get_model_repository_index()[0]["name"] == "student"


def test_tritonclient_statistics_count(artefact, images):
    with server(artefact) as (_, port), httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = httpclient.InferInput("images", images.shape, "UINT8")
        given.set_data_from_numpy(images)
        for _ in range(4):
            client.infer("student", [given])
        for statistics in (client.get_inference_statistics(), client.get_inference_statistics("student")):
            (model,) = statistics["model_stats"]
            assert model["inference_count"] == 12
            assert model["execution_count"] == 4
            assert model["inference_stats"]["success"]["count"] == 4
            assert model["inference_stats"]["success"]["ns"] > model["inference_stats"]["queue"]["ns"] > 0
            assert model["batch_stats"][0]["batch_size"] == 3
        status, _, text = ask(port, "/metrics")
        assert status == 200
        assert 'kdlite_requests_total{endpoint="infer",status="200"} 4.0' in text.decode()
        assert "kdlite_batch_images_sum 12.0" in text.decode()


def test_tritonclient_in_asyncio(port, artefact, images):
    aio = pytest.importorskip("tritonclient.http.aio")

    async def main():
        async with aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            given = aio.InferInput("images", images.shape, "UINT8")
            given.set_data_from_numpy(images)
            answers = await asyncio.gather(*(client.infer("student", [given]) for _ in range(20)))
            return [answer.as_numpy("logits") for answer in answers]

    for logits in asyncio.run(main()):
        np.testing.assert_allclose(logits, load(artefact).run(images), rtol=1e-5, atol=1e-6)


def test_json_data_may_be_flat_or_nested(port, artefact, images):
    expected = load(artefact).run(images[:1])
    for data in (images[:1].ravel().tolist(), images[:1].tolist()):
        status, _, body = ask(port, INFER, json.dumps({"inputs": [tensor(data=data)]}).encode())
        assert status == 200
        np.testing.assert_allclose(json.loads(body)["outputs"][0]["data"], expected.ravel(), rtol=1e-5, atol=1e-6)


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "headers", "said"), [
    (b"", {}, "not a request"),
    (b"{", {}, "not a request"),
    (b"[]", {}, "not a request"),
    (b"\xff\xfe", {}, "not a request"),
    (b"[" * 100_000, {}, "not a request"),
    (b'{"inputs": []}', {}, "not a request"),
    (b'{"inputs": [7]}', {}, "not a request"),
    (b'{"inputs": [{"name": "images"}]}', {}, "not a request"),
    (json.dumps({"inputs": [tensor(data=[1]), tensor(data=[1])]}).encode(), {}, "not a request"),
    (json.dumps({"inputs": [tensor(name="image", data=[1])]}).encode(), {}, "unknown input 'image'"),
    (json.dumps({"inputs": [tensor(datatype="FP32", data=[1])]}).encode(), {}, "datatype 'FP32'"),
    (json.dumps({"inputs": [tensor((1, 3, 16, 16), data=[1])]}).encode(), {}, "shape [1, 3, 16, 16]"),
    (json.dumps({"inputs": [tensor((0, *SHAPE), data=[])]}).encode(), {}, "0 images"),
    (json.dumps({"inputs": [tensor((9, *SHAPE), data=[])]}).encode(), {}, "9 images"),
    (json.dumps({"inputs": [tensor((-1, *SHAPE), data=[])]}).encode(), {}, "-1 images"),
    (json.dumps({"inputs": [tensor((1.0, *SHAPE), data=[])]}).encode(), {}, "shape [1.0"),
    (json.dumps({"inputs": [tensor(data=[1, 2])]}).encode(), {}, "list of 768 numbers"),
    (json.dumps({"inputs": [tensor(data=[256] * ONE)]}).encode(), {}, "has 256; expected integers"),
    (json.dumps({"inputs": [tensor(data=[0.5] * ONE)]}).encode(), {}, "has 0.5; expected integers"),
    (json.dumps({"inputs": [tensor(data=["x"] * ONE)]}).encode(), {}, "has 'x'; expected integers"),
    (json.dumps({"inputs": [tensor()]}).encode(), {}, "list of 768 numbers"),
    (json.dumps({"inputs": [tensor(data=[0] * ONE)], "outputs": [{"name": "scores"}]}).encode(), {}, "'scores'"),
    (json.dumps({"inputs": [tensor(data=[0] * ONE)], "id": 7}).encode(), {}, "id must be a string"),
    (json.dumps({"inputs": [tensor(data=[0] * ONE)],
                 "outputs": [{"name": "logits", "parameters": {"classification": "all"}}]}).encode(), {}, "classifi"),
    (*binary(of(), b"\0" * (ONE - 1)), "got 767"),
    (*binary(of(), b"\0" * (ONE + 1)), "got 769"),
    (*binary(of(size=7), b"\0" * ONE), "binary_data_size is 7"),
    (*binary(of(size="all"), b"\0" * ONE), "binary_data_size is all"),
    (b"{}", {"Inference-Header-Content-Length": "3"}, "the body has 2 bytes"),
    (b"{}", {"Inference-Header-Content-Length": "-1"}, "'-1'"),
    (b"{}", {"Inference-Header-Content-Length": "x"}, "'x'"),
    (b"{}", {"Content-Encoding": "gzip"}, "not valid gzip"),
    (bytes.fromhex("1f8b08000000000000"), {"Content-Encoding": "gzip"}, "not valid gzip"),
])  # fmt: skip
def test_a_wrong_request_is_400_with_the_reason_and_the_server_goes_on(port, body, headers, said):
    status, _, answer = ask(port, INFER, body, headers)
    assert (status, said in json.loads(answer)["error"]) == (400, True), answer
    good = json.dumps({"inputs": [tensor(data=[0] * ONE)]}).encode()
    assert ask(port, INFER, good)[0] == 200


@pytest.mark.parametrize(("path", "method", "status"), [
    ("/v2/models/another/infer", "POST", 404),
    ("/v2/models/student/versions/2/infer", "POST", 404),
    ("/v2/models/another", "GET", 404),
    ("/nowhere", "GET", 404),
    ("/predict", "GET", 405),
    (INFER, "GET", 405),
    ("/predict?top=0", "POST", 400),
    ("/predict?top=many", "POST", 400),
    ("/predict", "POST", 400),
])  # fmt: skip
def test_a_wrong_path_or_method_says_so(port, path, method, status):
    got, headers, answer = ask(port, path, b"no image" if method == "POST" else None, method=method)
    assert got == status
    assert json.loads(answer)["error"]
    assert headers["content-type"] == "application/json"


def test_a_body_over_the_limit_is_413(artefact):
    with server(artefact, "--body-limit", "0.01") as (_, port):
        assert ask(port, "/predict", b"\0" * 20_000)[0] == 413
        packed = gzip.compress(b"\0" * 5_000_000)
        assert len(packed) < 0.01 * 2**20
        assert ask(port, INFER, packed, {"Content-Encoding": "gzip"})[0] == 413
        with socket.create_connection(("127.0.0.1", port)) as chunked:  # no Content-Length to look at
            chunked.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunked.sendall(b"8000\r\n" + b"\0" * 0x8000 + b"\r\n")
            assert b" 413 " in chunked.recv(1000)
        assert ask(port, "/v2/health/ready")[0] == 200


@contextlib.contextmanager
def in_this_process(runtime, limits):
    """The application in a thread, so that a test can hold its runtime back."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(make_app(StudentServer(runtime, "student", limits)), log_level="error"))
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(30)


def test_a_full_queue_is_503_and_requests_are_batched(artefact, images):
    runtime = load(artefact, RunOn("cpu"))
    gate, sizes = threading.Event(), []

    def held_back(batch):
        gate.wait(30)
        sizes.append(len(batch))
        return runtime.run(batch)

    body = json.dumps({"inputs": [tensor(data=images[0].ravel().tolist())]}).encode()
    held = dataclasses.replace(runtime, run=held_back)
    with in_this_process(held, Limits(4, 0.0, 6)) as port, concurrent.futures.ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, port, INFER, body)
        while True:  # until it is in the runtime's hands
            time.sleep(0.05)
            if b"kdlite_queue_images 0.0" in ask(port, "/metrics")[2]:
                break
        rest = [pool.submit(ask, port, INFER, body) for _ in range(10)]
        while sum(request.done() for request in rest) < 5:  # one runs and five wait, as --queue allows
            time.sleep(0.05)
        assert all("6 of 6 images" in json.loads(r.result()[2])["error"] for r in rest if r.done())
        gate.set()
        answers = [first.result(), *(r.result() for r in rest)]
    assert sorted(status for status, _, _ in answers).count(503) == 5
    assert sum(sizes) == 6
    assert max(sizes) == 4
    expected = runtime.run(images[:1]).ravel()
    for status, _, answer in answers:
        if status == 200:
            np.testing.assert_allclose(json.loads(answer)["outputs"][0]["data"], expected, rtol=1e-5, atol=1e-6)


def test_a_runtime_that_fails_is_500_and_the_server_goes_on(artefact, images):
    runtime = load(artefact, RunOn("cpu"))
    calls = []

    def fails_once(batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return runtime.run(batch)

    broken = dataclasses.replace(runtime, run=fails_once)
    body = json.dumps({"inputs": [tensor(data=images[0].ravel().tolist())]}).encode()
    with in_this_process(broken, Limits()) as port:
        status, _, answer = ask(port, INFER, body)
        assert (status, json.loads(answer)["error"]) == (500, "the runtime failed: out of memory")
        assert ask(port, INFER, body)[0] == 200
        statistics = json.loads(ask(port, "/v2/models/student/stats")[2])["model_stats"][0]["inference_stats"]
        assert (statistics["fail"]["count"], statistics["success"]["count"]) == (1, 1)


def test_each_request_gets_its_own_answer_out_of_a_batch(artefact):
    images = np.random.default_rng(1).integers(0, 256, (40, *SHAPE), dtype=np.uint8)
    expected = load(artefact).run(images)
    sizes = [1, 3, 2, 5, 8, 1, 4, 7, 2, 6, 1]
    starts = np.cumsum([0, *sizes[:-1]])
    with server(artefact, "--max-delay", "20") as (_, port), concurrent.futures.ThreadPoolExecutor(11) as pool:

        def send(start, size):
            request = of((size, *SHAPE), size * ONE) | {"parameters": {"binary_data_output": True}}
            status, headers, body = ask(port, INFER, *binary(request, images[start : start + size].tobytes()))
            assert status == 200
            split = int(headers["Inference-Header-Content-Length"])
            assert json.loads(body[:split])["outputs"][0]["shape"] == [size, 7]
            return np.array(struct.unpack(f"<{7 * size}f", body[split:])).reshape(size, 7)

        for start, size, logits in zip(starts, sizes, pool.map(send, starts, sizes)):
            np.testing.assert_allclose(logits, expected[start : start + size], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sigterm_answers_what_was_begun_and_ends_with_0(artefact):
    body = json.dumps({"inputs": [tensor(data=[0] * ONE)]}).encode()
    with server(artefact, "--max-delay", "1500") as (process, port):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, port, INFER, body)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert answer.result()[0] == 200
        assert process.wait(30) == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))


def test_a_port_that_is_taken_is_one_line(artefact, port):
    command = [sys.executable, "-m", "deploy.serve", artefact, "--port", str(port), "--device", "cpu"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in answer.stderr
    assert answer.stderr.count("\n") == 1


# ---- photographs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_predict_prepares_a_photograph_as_training_does(port, artefact, kind):
    file = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).save(file, kind)
    status, _, body = ask(port, "/predict?top=3", file.getvalue())
    assert status == 200
    runtime = load(artefact)
    photo = prepare(open_image(file.getvalue()), runtime.metadata)
    logits = torch.from_numpy(runtime.run(photo[None]))[0].double()
    best = logits.softmax(0).topk(3)
    predictions = json.loads(body)["predictions"]
    assert [p["index"] for p in predictions] == best.indices.tolist()
    assert [p["probability"] for p in predictions] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert [p["label"] for p in predictions] == [runtime.metadata.label_names[i] for i in best.indices]


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_an_image_of_too_many_pixels_is_413(port, side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    status, _, body = ask(port, "/predict", file.getvalue())
    assert status == 413
    assert "too large" in json.loads(body)["error"]
