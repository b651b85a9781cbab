"""Test deploy.serve with Triton's client, concurrent requests and photographs."""

import asyncio
import concurrent.futures
import dataclasses
import io
import json
import os
import struct
import threading

import numpy as np
import pytest
from PIL import Image, features
from serving import (
    INFER,
    NAMES,
    ONE,
    SHAPE,
    ask,
    binary,
    error_of,
    in_process,
    in_thread,
    metric,
    numbers,
    of,
    picture,
    wait_until,
)
from sklearn.datasets import load_sample_images

from deploy.onnx_tools import write
from deploy.preprocess import open_image, prepare
from deploy.runtimes import RunOn, load, softmax
from deploy.server import images as images_module
from deploy.server.app import Limits

httpclient = pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def port(artefact):
    with in_thread(artefact) as port:
        yield port


@pytest.fixture(scope="module")
def site(artefact):
    with in_process(artefact) as client:
        yield client


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(artefact, images):
    return load(artefact, RunOn("cpu")).run(images)


def triton_input(images, http=httpclient, **options):
    given = http.InferInput("images", images.shape, "UINT8")
    given.set_data_from_numpy(images, **options)
    return [given]


# ---- Triton's own client ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_gets_the_logits_of_the_runtime(port, expected, images, binary, compression):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        answer = client.infer(
            "student", triton_input(images, binary_data=binary),
            outputs=[httpclient.InferRequestedOutput("logits", binary_data=binary)], request_id="photo 7",
            request_compression_algorithm=compression, response_compression_algorithm=compression,
        )  # fmt: skip
    assert answer.get_response()["id"] == "photo 7"
    assert answer.get_response()["model_name"] == "student"
    np.testing.assert_allclose(answer.as_numpy("logits"), expected, rtol=1e-5, atol=1e-6)


def test_tritonclient_may_omit_outputs_or_give_a_version_or_ask_asynchronously(port, expected, images):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = triton_input(images)
        answers = [client.infer("student", given), client.infer("student", given, model_version="1")]
        answers += [request.get_result() for request in [client.async_infer("student", given) for _ in range(5)]]
    for answer in answers:
        np.testing.assert_allclose(answer.as_numpy("logits"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_best_classes(port, expected, images, binary):
    with httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        outputs = [httpclient.InferRequestedOutput("logits", binary_data=binary, class_count=3)]
        answer = client.infer("student", triton_input(images), outputs=outputs).as_numpy("logits")
    assert answer.shape == (3, 3)
    for row, best in zip(expected, answer):
        for index, text in zip(np.argsort(-row)[:3], best):
            value, i, label = (text.decode() if isinstance(text, bytes) else text).split(":")
            assert (int(i), label) == (index, NAMES[index])
            assert float(value) == pytest.approx(row[index], abs=1e-5)


def test_tritonclient_reads_the_metadata_of_server_and_model(port):
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


def test_statistics_and_metrics_count_requests_and_images(artefact, images):
    with in_thread(artefact) as port, httpclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        for _ in range(4):
            client.infer("student", triton_input(images))
        for statistics in (client.get_inference_statistics(), client.get_inference_statistics("student")):
            (model,) = statistics["model_stats"]
            assert model["inference_count"] == 12
            assert model["execution_count"] == 4
            assert model["inference_stats"]["success"]["count"] == 4
            assert model["inference_stats"]["success"]["ns"] > model["inference_stats"]["queue"]["ns"] > 0
            assert model["batch_stats"][0]["batch_size"] == 3
        assert metric(port, 'kdlite_requests_total{endpoint="infer",status="200"}') == 4
        assert metric(port, "kdlite_batch_images_sum") == 12
        assert metric(port, 'kdlite_queue_seconds_count{model="student"}') == 4
        assert metric(port, 'kdlite_compute_seconds_count{model="student"}') == 4
        assert 0 < metric(port, 'kdlite_compute_seconds_sum{model="student"}') < 5
        assert metric(port, "process_resident_memory_bytes") > 20e6


def test_tritonclient_works_in_asyncio(port, expected, images):
    aio = pytest.importorskip("tritonclient.http.aio")

    async def main():
        async with aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            given = triton_input(images, aio)
            answers = await asyncio.gather(*(client.infer("student", given) for _ in range(20)))
            return [answer.as_numpy("logits") for answer in answers]

    for logits in asyncio.run(main()):
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


# ---- concurrent requests ------------------------------------------------------------------------------------------


def test_a_full_queue_gives_503_and_waiting_requests_share_batches(artefact, images, expected):
    runtime, gate, sizes = load(artefact, RunOn("cpu")), threading.Event(), []

    def held_back(batch):
        gate.wait(30)
        sizes.append(len(batch))
        return runtime.run(batch)

    body = numbers(data=images[0].ravel().tolist())
    limits = Limits(max_batch=4, max_delay_ms=0.0, queue=6)
    with in_process(artefact, limits, run=held_back) as site, concurrent.futures.ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, site, INFER, body)
        wait_until(lambda: site.app.state.server.queue.taken == 1 and metric(site, "kdlite_queue_images") == 0)
        rest = [pool.submit(ask, site, INFER, body) for _ in range(10)]
        wait_until(lambda: sum(request.done() for request in rest) == 5)  # one image runs and five wait
        refused = [request.result() for request in rest if request.done()]
        assert {status for status, _, _ in refused} == {503}
        assert {headers["Retry-After"] for _, headers, _ in refused} == {"1"}
        assert all("6 of 6 images" in json.loads(answer)["error"] for _, _, answer in refused)
        assert error_of(site, "/predict", picture())[0] == 503  # photographs count too
        gate.set()
        answers = [first.result(), *(request.result() for request in rest)]
    assert sum(sizes) == 6
    assert max(sizes) == 4
    for status, _, answer in answers:
        if status == 200:
            np.testing.assert_allclose(json.loads(answer)["outputs"][0]["data"], expected[0], rtol=1e-5, atol=1e-6)


def test_each_request_gets_its_own_rows_of_a_batch(artefact):
    images = np.random.default_rng(1).integers(0, 256, (40, *SHAPE), dtype=np.uint8)
    expected = load(artefact, RunOn("cpu")).run(images)
    sizes = [1, 3, 2, 5, 8, 1, 4, 7, 2, 6, 1]
    starts = np.cumsum([0, *sizes[:-1]])
    limits = Limits(max_delay_ms=20)
    with in_process(artefact, limits) as site, concurrent.futures.ThreadPoolExecutor(11) as pool:

        def send(start, size):
            request = of((size, *SHAPE), size * ONE) | {"parameters": {"binary_data_output": True}}
            status, headers, body = ask(site, INFER, *binary(request, images[start : start + size].tobytes()))
            assert status == 200
            split = int(headers["Inference-Header-Content-Length"])
            assert json.loads(body[:split])["outputs"][0]["shape"] == [size, 7]
            return np.array(struct.unpack(f"<{7 * size}f", body[split:])).reshape(size, 7)

        for start, size, logits in zip(starts, sizes, pool.map(send, starts, sizes)):
            np.testing.assert_allclose(logits, expected[start : start + size], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_readiness_fails_when_the_thread_of_the_runtime_has_ended(artefact):
    def end_the_thread(images):
        raise SystemExit

    with in_process(artefact, run=end_the_thread) as site:
        assert ask(site, "/v2/health/ready")[0] == 200
        assert ask(site, INFER, numbers())[0] == 500
        wait_until(lambda: ask(site, "/v2/health/ready")[0] == 503)
        assert ask(site, "/v2/models/student/ready")[0] == 503
        status, headers, body = ask(site, INFER, numbers())
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "restart" in json.loads(body)["error"]
        assert ask(site, "/v2/health/live")[0] == 200


def test_readiness_fails_while_no_decoder_starts(artefact, monkeypatch):
    """Imitate a server whose .pyz was replaced by a damaged file."""
    monkeypatch.setattr(images_module, "prepare_process", os.abort)
    with in_process(artefact) as site:
        assert ask(site, "/predict", picture())[0] == 503
        wait_until(lambda: ask(site, "/v2/health/ready")[0] == 503)
        assert ask(site, INFER, numbers())[0] == 200
        monkeypatch.undo()
        assert ask(site, "/predict", picture())[0] == 503  # this starts new processes
        wait_until(lambda: ask(site, "/v2/health/ready")[0] == 200)
        assert ask(site, "/predict", picture())[0] == 200


# ---- photographs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_predict_returns_the_probabilities_of_the_prepared_photograph(site, artefact, kind):
    file = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).save(file, kind)
    status, _, body = ask(site, "/predict?top=3", file.getvalue())
    assert status == 200
    runtime = load(artefact, RunOn("cpu"))
    probabilities = softmax(runtime.run(prepare(open_image(file.getvalue()), runtime.metadata)[None]))[0]
    best = np.argsort(-probabilities)[:3]
    predictions = json.loads(body)["predictions"]
    assert [p["index"] for p in predictions] == best.tolist()
    assert [p["probability"] for p in predictions] == pytest.approx(probabilities[best].tolist(), rel=1e-4)
    assert [p["label"] for p in predictions] == [NAMES[i] for i in best]


def test_predict_divides_by_the_temperature_and_applies_the_threshold(artefact, tmp_path):
    """Check too that the V2 protocol still returns raw logits."""
    import onnx

    def answer(**changes):
        file = tmp_path / "student.onnx"
        write(onnx.load(artefact), dataclasses.replace(load(artefact, RunOn("cpu")).metadata, **changes), file)
        with in_process(file) as site:
            raw = json.loads(ask(site, INFER, numbers())[2])["outputs"][0]["data"]
            return json.loads(ask(site, "/predict?top=7", picture())[2]), raw

    plain, logits = answer()
    assert (plain["none_of_these"], plain["threshold"]) == (False, None)
    scaled, same = answer(temperature=2.0, threshold=0.999)
    assert same == logits
    assert (scaled["none_of_these"], scaled["threshold"]) == (True, 0.999)
    assert [p["index"] for p in scaled["predictions"]] == [p["index"] for p in plain["predictions"]]
    roots = np.sqrt([p["probability"] for p in plain["predictions"]])
    assert [p["probability"] for p in scaled["predictions"]] == pytest.approx((roots / roots.sum()).tolist(), rel=1e-4)
    largest = scaled["predictions"][0]["probability"]
    assert answer(temperature=2.0, threshold=largest - 1e-6)[0]["none_of_these"] is False


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF"])
def test_predict_reads_the_formats_that_people_send(site, kind):
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    status, _, body = ask(site, "/predict", picture(kind))
    assert (status, len(json.loads(body)["predictions"])) == (200, 5)


@pytest.mark.parametrize(("kind", "size"), [("TIFF", (20, 20)), ("BMP", (20, 20)), ("TIFF", (1, 1)), ("PPM", (9, 9))])
def test_other_formats_need_the_flag_formats(artefact, site, kind, size):
    status, message = error_of(site, "/predict", picture(kind, size))
    assert (status, f"the file is {kind}: this server reads it only with --formats" in message) == (400, True)
    with in_process(artefact, Limits(formats=("JPEG", kind))) as other:
        assert ask(other, "/predict", picture(kind, size))[0] == 200
        assert error_of(other, "/predict", picture("PNG"))[0] == 400


@pytest.mark.parametrize(("body", "reason"), [
    (b"", "it is empty"),
    (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC, as iPhones make it: set the camera to Most Compatible"),
    (b"\0\0\0\x1cftypmif1" + bytes(100), "HEIF: convert it"),
    (b"\0\0\0\x18ftypisom" + bytes(100), "not an image of a known format"),
    (b"\xff\x0a" + bytes(100), "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    (b"%PDF-1.7\n", "PDF"),
    (b'{"image": "aGVsbG8="}', "it starts with"),
    (b"/9j/4AAQSkZJRgABAQ", "base64"),
    (b"iVBORw0KGgoAAAANSUhEUg", "base64"),
    (b"data:image/png;base64,iVBORw0KGgo", "base64"),
    (b"hello", "not an image of a known format"),
    (picture("JPEG")[:300], "cannot be read"),
    (picture("PNG")[:60], "cannot be read"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_400_with_the_reason(site, body, reason):
    status, message = error_of(site, "/predict", body)
    assert (status, reason in message) == (400, True), message
    assert "object at" not in message
    assert "curl" not in message  # because the page shows the message too


def test_a_photograph_whose_line_ends_curl_d_removed_gets_advice(site):
    body = picture().replace(b"\n", b"").replace(b"\r", b"")
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    status, message = error_of(site, "/predict", body, headers)
    assert (status, "with curl --data-binary, not with -d" in message) == (400, True), message
    assert ask(site, "/predict", picture(), headers)[0] == 200


@pytest.mark.parametrize(("query", "reason"), [
    ("top=0", "top is '0'"), ("top=many", "top is 'many'"), ("top=" + "9" * 5000, "top is"), ("top=-1", "top is '-1'"),
    ("top_k=5", "unknown query parameter 'top_k'"), ("top=5&k=1", "unknown query parameter 'k'"),
])  # fmt: skip
def test_a_wrong_query_of_predict_is_400_with_the_reason(site, query, reason):
    status, message = error_of(site, f"/predict?{query}", picture())
    assert (status, reason in message) == (400, True), message


def form(*parts, boundary="b0"):
    lines = [b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), about, content)
             for about, content in parts]  # fmt: skip
    content_type = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return b"".join(lines) + b"--%s--\r\n" % boundary.encode(), content_type


def test_predict_reads_a_form_with_one_file(site):
    expected = ask(site, "/predict", picture())[2]
    photo = b'name="image"; filename="a.png"', picture()
    for parts in ([photo], [(b'name="note"', b"hello"), photo, (b'name="top"', b"3")]):
        assert ask(site, "/predict", *form(*parts))[2] == expected
    noise = np.random.default_rng(0).integers(0, 256, (800, 1000, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")  # more than the form's parser keeps in memory by default
    assert ask(site, "/predict", *form((b'name="image"; filename="a.png"', file.getvalue())))[0] == 200


@pytest.mark.parametrize(("body", "headers", "reason"), [
    (*form((b'name="a"; filename="a"', b"1"), (b'name="b"; filename="b"', b"2")), "2 files"),
    (*form((b'name="a"', b"1")), "0 files"),
    (*form(*[(b'name="a"', b"1")] * 200), "0 files"),
    (b"nonsense", {"Content-Type": "multipart/form-data; boundary=b0"}, "form"),
    (b"nonsense", {"Content-Type": "multipart/form-data"}, "boundary"),
    (b"nonsense", {"Content-Type": "multipart/mixed; boundary=b0"}, "form-data"),
    (*form((b'name="a"; filename="a"', b"no image")), "not an image"),
    (*form((b'name="a"; filename="a"', b"")), "empty"),
])  # fmt: skip
def test_a_form_without_exactly_one_image_is_refused_with_the_reason(site, body, headers, reason):
    status, message = error_of(site, "/predict", body, headers)
    assert (status, reason in message) == (400, True), message


def test_predict_gives_500_if_the_logits_are_not_finite(artefact):
    with in_process(artefact, run=lambda images: np.full((len(images), 7), np.nan, np.float32)) as site:
        assert error_of(site, "/predict", picture()) == (500, "the model's logits are not finite")
