"""deploy.serve: whatever a request holds, it costs bounded memory and time, and nobody else waits for it."""

import concurrent.futures
import contextlib
import gzip
import io
import json
import os
import re
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import INFER, ONE, SHAPE, ask, binary, keep_alive, metric, of, server, tensor, wait_until

pytestmark = pytest.mark.slow  # each starts servers

MIB = 2**20
GZIP = {"Content-Encoding": "gzip"}
FORM = {"Content-Type": "multipart/form-data; boundary=aaaa"}
HEAD = json.dumps({"inputs": [tensor()]})[:-3].encode() + b', "data": '


@pytest.fixture(scope="module")
def served(artefact):
    """(process, port)"""
    with server(artefact) as running:
        yield running


@pytest.fixture(scope="module")
def port(served):
    return served[1]


def png(width, height, bits=1, colour=0):
    """A PNG of zeros, which costs a few bytes however large it is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    samples = {0: 1, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * bits * samples + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of_scans(count, side=4000):
    """A progressive JPEG that passes over all its pixels many times."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def webp(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "WEBP", method=0, lossless=True, quality=0)
    return file.getvalue()


def memory_mib(pid):
    """The most that it ever held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


ONES = b"1," * (ONE - 1)  # and one number more
NO_IMAGE = b"no image"
PART = b'--aaaa\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n\r\n'
HOSTILE = {
    "a strip that the resize would make 128 million pixels": ("/predict", png(500_000, 1), {}, 413),
    "a column of the same": ("/predict", png(1, 500_000), {}, 413),
    "64 million pixels in 8 kB": ("/predict", png(8_000, 7_999), {}, 200),
    "48 million pixels of WebP": ("/predict", webp(8_000, 6_000), {}, 200),
    "a JPEG of 600 scans": ("/predict", jpeg_of_scans(600), {}, 413),
    "a number of 400 digits": (INFER, HEAD + b"[1" + b"0" * 400 + b"]}]}", {}, 400),
    "5,000 digits among the right numbers": (INFER, HEAD + b"[" + ONES + b"9" * 5000 + b"]}]}", {}, 400),
    "15 million digits among them": (INFER, HEAD + b"[" + ONES + b"0." + b"9" * 15_000_000 + b"]}]}", {}, 413),
    "a shape of 5,000 digits": (INFER, HEAD.replace(b"[1,", b"[" + b"9" * 5000 + b",") + b"[]}]}", {}, 400),
    "5.5 million empty lists": (INFER, gzip.compress(HEAD + b"[" + b"[]," * 5_500_000 + b"[]]}]}"), GZIP, 413),
    "lists in lists": (INFER, gzip.compress(HEAD + b"[" * 16_000_000), GZIP, 413),
    "lists where no tensor is": (INFER, gzip.compress(b'{"x": [' + b"[]," * 5_500_000 + b"[]]}"), GZIP, 413),
    "800,000 members of gzip": (INFER, gzip.compress(b"") * 800_000, GZIP, 400),
    "a name of 15 MB": (INFER, b'{"inputs": [{"name": "' + b"x" * 15_000_000 + b'"}]}', {}, 413),
    "a parameter that is half a character": (
        INFER,
        b'{"inputs": [7], "parameters": {"\\ud800": ["\\udfff"]}}',
        {},
        400,
    ),
    "a name that is one": (INFER, json.dumps({"inputs": [tensor(name="\ud800", data=[1])]}).encode(), {}, 400),
    "top of 5,000 digits": ("/predict?top=" + "9" * 5000, NO_IMAGE, {}, 400),
    "a header of 5,000 digits": (INFER, b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400),
    "a form of all but boundaries": ("/predict", b"--aaaa\r\n\r\n" + b"\r\n--aaa" * 2_200_000, FORM, 400),
    "a form of 200,000 files": ("/predict", PART * 200_000, FORM, 400),
    "16 MB of noise": ("/predict", np.random.default_rng(0).bytes(16_000_000), {}, 400),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_is_refused_and_the_health_probe_answers_within_50_ms(port, kind):
    path, body, headers, expected = HOSTILE[kind]
    slowest = []
    while len(slowest) < 10:  # what else runs on this machine may delay a probe; what is wrong delays each time
        probes = []
        with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(keep_alive(port)) as health:
            request = pool.submit(ask, port, path, body, headers)
            while not request.done() or len(probes) < 5:
                started = time.perf_counter()
                health.request("GET", "/v2/health/live")
                assert health.getresponse().read() == b'{"live":true}'
                probes.append(time.perf_counter() - started)
                time.sleep(0.002)
        status, _, answer = request.result()
        assert status == expected, answer[:300]
        assert len(answer) < 1000
        slowest.append(max(probes))
        if slowest[-1] < 0.05:
            return
        time.sleep(0.3)
    pytest.fail(f"the slowest probe of each try took {slowest} s")


def test_the_largest_tensor_in_json_is_read_beside_the_event_loop(port):
    images = np.random.default_rng(1).integers(0, 256, (8, *SHAPE), dtype=np.uint8)
    for nested in (images, images.ravel()):
        body = json.dumps({"inputs": [tensor(images.shape, data=nested.tolist())], "outputs": [
            {"name": "logits", "parameters": {"classification": 1}}]}, indent=4).encode()  # fmt: skip
        told = json.loads(ask(port, INFER, body)[2])["outputs"][0]["data"]
        raw = binary(of(images.shape, images.size, parameters={"binary_data_size": images.size}) | {
            "outputs": [{"name": "logits", "parameters": {"classification": 1}}]}, images.tobytes())  # fmt: skip
        assert told == json.loads(ask(port, INFER, *raw)[2])["outputs"][0]["data"]


@pytest.mark.parametrize("data", [
    "[1,,2]", "[1 2]", "[01]", "[1]]", "[[1], 2]", "[1,]", "[true]", "[NaN]", "[null]", '["1"]', "{}", "1", "null",
    "[-1]", "[1e-1]", "[256]", "[1e400]", "[[[[1]]]]",
])  # fmt: skip
def test_what_is_no_tensor_of_the_shape_is_refused(port, data):
    data = data.replace("1", ", ".join(["1"] * ONE), 1) if data not in ("1", "[1e-1]", "[1e400]", "[-1]") else data
    status, _, answer = ask(port, INFER, HEAD + data.encode() + b"}]}")
    assert (status, "error" in json.loads(answer)) == (400, True)


def test_photographs_decode_within_a_budget_of_pixels(artefact):
    large = png(8_000, 7_999)
    with server(artefact) as (process, port), concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(port, "/predict", large), range(20)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503}
        assert {headers["Retry-After"] for status, headers, _ in answers if status == 503} == {"1"}
        assert "pixels" in next(json.loads(body)["error"] for status, _, body in answers if status == 503)
        assert ask(port, "/predict", large)[0] == 200  # what was lent came back
        decoders = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        # one at a time: 64 MiB of greys, 256 of colours
        assert memory_mib(process.pid) + sum(map(memory_mib, decoders)) < 800


def test_an_image_that_ends_the_decoder_is_refused_and_the_next_is_decoded(artefact):
    large = png(3_000, 3_000)
    with server(artefact) as (process, port):
        assert ask(port, "/predict", large)[0] == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:  # as an image would that finds a fault in Pillow
            os.kill(int(child), signal.SIGKILL)
        wait_until(lambda: ask(port, "/predict", large)[0] == 200)
        assert ask(port, "/v2/health/ready")[0] == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_bodies_are_held_within_a_budget(artefact):
    with server(artefact, "--body-limit", "1", limits={"bodies": 3}) as (_, port):
        uploads = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for upload in uploads:
            upload.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(900_000))
        for upload in uploads:
            upload.settimeout(0.5)
        answered = []
        for upload in uploads:
            try:
                answered.append(upload.recv(1000))
            except TimeoutError:
                answered.append(b"")
        assert sum(b" 503 " in answer for answer in answered) == 1
        assert sum(answer == b"" for answer in answered) == 3
        for upload in uploads:
            upload.close()
        wait_until(lambda: ask(port, "/predict", bytes(1_000_000))[0] == 400)  # no image, but there is room for it


def test_a_client_that_breaks_off_its_upload_is_no_error_of_the_server(artefact):
    with server(artefact) as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as upload:
            upload.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        wait_until(lambda: metric(port, 'kdlite_requests_total{endpoint="predict",status="499"}') == 1)
        assert metric(port, 'kdlite_requests_total{endpoint="predict",status="500"}') == 0
        process.terminate()
        assert process.communicate(timeout=30)[1] == ""


def test_what_the_readers_of_images_and_forms_warn_of_is_not_logged(artefact):
    exif = b"\xff\xe1\x00\x18Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x09\0"  # it breaks off
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", exif=exif[4:])
    with server(artefact) as (process, port):
        for side in (9_500, 9_600, 9_700):  # Pillow warns above 89 million pixels
            assert ask(port, "/predict", png(side, side))[0] == 413
        assert ask(port, "/predict", file.getvalue())[0] == 200
        assert ask(port, "/predict", b"nonsense", FORM)[0] == 400
        process.terminate()
        assert process.communicate(timeout=30)[1] == ""


# ---- slow clients -------------------------------------------------------------------------------------------------

SHORT = {"headers_s": 1.0, "body_s": 1.0, "idle_s": 1.0}


@pytest.fixture(scope="module")
def impatient(artefact):
    with server(artefact, limits=SHORT) as (_, port):
        yield port


@pytest.mark.parametrize(("begin", "drop", "answer"), [
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n", b" 408 "),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x", b" 408 "),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b" 408 "),
    (b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x", b" 405 "),  # answered, then no end
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", b"", b" 200 "),
    (b"", b"", b""),
], ids=["headers", "body", "chunks", "body of no use", "idle", "silent"])  # fmt: skip
def test_a_slow_client_is_answered_and_closed(impatient, begin, drop, answer):
    with socket.create_connection(("127.0.0.1", impatient)) as client:
        client.settimeout(0.1)
        started, received = time.monotonic(), b""
        client.sendall(begin)
        while time.monotonic() - started < 10:
            try:
                if drop:
                    client.sendall(drop)
                part = client.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            received += part
        assert 0.9 < time.monotonic() - started < 6
        assert answer in received
        assert received.count(b"HTTP/1.1") == bool(answer)


def test_a_client_that_reads_no_answers_is_closed(impatient):
    with socket.create_connection(("127.0.0.1", impatient)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.2)

        def ask_on():
            with contextlib.suppress(TimeoutError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            return False

        with pytest.raises(ConnectionError):
            wait_until(ask_on)


def test_idle_connections_give_way_when_there_are_too_many(artefact):
    with server(artefact, "--connections", "20") as (_, port):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        started = time.monotonic()
        assert ask(port, "/v2/health/ready")[0] == 200
        assert time.monotonic() - started < 2
        wait_until(lambda: metric(port, 'kdlite_connections_closed_total{why="limit"}') >= 40)
        for connection in idle:
            connection.close()


def test_more_connections_than_the_limit_that_all_have_requests_are_503(artefact):
    with server(artefact, "--connections", "3") as (_, port):
        busy = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for connection in busy:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.3)
        status, headers, body = ask(port, "/v2")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "3 connections" in json.loads(body)["error"]
        for connection in busy:
            connection.close()
        wait_until(lambda: ask(port, "/v2")[0] == 200)


def test_few_file_descriptors_are_said_once_and_others_are_served(artefact):
    with server(artefact, prefix=("prlimit", "--nofile=200")) as (process, port):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for _ in range(20):
            assert ask(port, "/v2/health/ready")[0] == 200
        for connection in idle:
            connection.close()
        process.terminate()
        said = process.communicate(timeout=30)[1].splitlines()
        assert said[0] == "136 connections, not 1024: ulimit -n is 200"
        assert len(said) <= 2


@pytest.mark.parametrize("request_line", [
    b"NONSENSE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
], ids=["words", "TLS", "a chunk of no size"])  # fmt: skip
def test_what_is_no_http_is_400_as_json(port, request_line):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(request_line)
        client.settimeout(10)
        answer = b""
        while part := client.recv(1000):
            answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert "error" in json.loads(body)
