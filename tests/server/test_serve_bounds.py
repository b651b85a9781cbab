"""Test that deploy.serve limits the memory and time of hostile requests, overload and slow clients."""

import asyncio
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
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import (
    INFER,
    ONE,
    ask,
    error_of,
    in_process,
    in_thread,
    keep_alive,
    metric,
    numbers,
    picture,
    server,
    tensor,
    wait_until,
)

from deploy.server import images
from deploy.server.app import Limits

pytestmark = pytest.mark.slow

MIB = 2**20
GZIP = {"Content-Encoding": "gzip"}
FORM = {"Content-Type": "multipart/form-data; boundary=aaaa"}
HEAD = json.dumps({"inputs": [tensor()]})[:-3].encode() + b', "data": '


@pytest.fixture(scope="module")
def served(artefact):
    """Yield the process and the port of a server."""
    with server(artefact) as running:
        assert ask(running[1], "/predict", picture())[0] == 200  # this starts a decoder
        yield running


@pytest.fixture(scope="module")
def port(served):
    return served[1]


@pytest.fixture(scope="module")
def site(artefact):
    with in_process(artefact) as client:
        yield client


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=1, colour=0):
    """Return a PNG of zeros: the file is small for any number of pixels."""
    samples = {0: 1, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * bits * samples + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND")


def jpeg_of_scans(count, side=4000):
    """Return a progressive JPEG that repeats its last scan of all pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def webp(width, height):
    return picture("WEBP", (width, height), method=0, lossless=True, quality=0)


def tiff_of_one_tile(side):
    """Return a TIFF of 16 x 16 pixels with one compressed tile of side x side pixels."""
    tile = zlib.compress(bytes(side * side), 9)
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 134),
               (325, len(tile))]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + tile


def bmp_rle(side):
    """Return a run-length coded BMP, which Pillow reads pixel by pixel in Python."""
    rows = b"\x00\x02\x01\x00\x01\x05" * 5000
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 2835, 2835, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


ONES = b"1," * (ONE - 1)  # all numbers of an image except the last
NOT_AN_IMAGE = b"no image"
PART = b'--aaaa\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n\r\n'
SMALL_PNG, SMALL_JPEG, SMALL_GIF = picture("PNG"), picture("JPEG"), picture("GIF")
# kind of request: path, function that makes the body, headers, expected status
HOSTILE = {
    "a strip that the resize enlarges to 128 million pixels": ("/predict", lambda: png(500_000, 1), {}, 413),
    "a column that the resize enlarges to 128 million pixels": ("/predict", lambda: png(1, 500_000), {}, 413),
    "64 million pixels in 8 kB": ("/predict", lambda: png(8_000, 7_999), {}, 200),
    "48 million pixels of WebP": ("/predict", lambda: webp(8_000, 6_000), {}, 200),
    "a JPEG of 600 scans": ("/predict", lambda: jpeg_of_scans(600), {}, 413),
    "a PNG of 200,000 chunks": (
        "/predict", lambda: SMALL_PNG[:33] + chunk(b"abCd") * 200_000 + SMALL_PNG[33:], {}, 200),
    "a JPEG of 500,000 markers": (
        "/predict", lambda: SMALL_JPEG[:2] + b"\xff\xe0\0\2" * 500_000 + SMALL_JPEG[2:], {}, 200),
    "a PNG with 100 MB of text": (
        "/predict", lambda: SMALL_PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB))) * 100, {}, 400),
    "a TIFF of 16 pixels a side with a tile of 16,384": ("/predict", lambda: tiff_of_one_tile(16_384), {}, 400),
    "a BMP of 64 million pixels in 33 kB": ("/predict", lambda: bmp_rle(8_000), {}, 400),
    "a number of 400 digits": (INFER, lambda: HEAD + b"[1" + b"0" * 400 + b"]}]}", {}, 400),
    "5,000 digits as the last number": (INFER, lambda: HEAD + b"[" + ONES + b"9" * 5000 + b"]}]}", {}, 400),
    "900,000 digits as the last number": (
        INFER, lambda: HEAD + b"[" + ONES + b"0.4" + b"9" * 900_000 + b"]}]}", {}, 400),
    "15 million digits as the last number": (
        INFER, lambda: HEAD + b"[" + ONES + b"0." + b"9" * 15_000_000 + b"]}]}", {}, 413),
    "a shape of 5,000 digits": (INFER, lambda: HEAD.replace(b"[1,", b"[" + b"9" * 5000 + b",") + b"[]}]}", {}, 400),
    "340,000 empty lists": (INFER, lambda: HEAD + b"[" + b"[]," * 340_000 + b"[]]}]}", {}, 413),
    "130,000 empty objects": (INFER, lambda: HEAD + b"[" + b"{}," * 130_000 + b"{}]}]}", {}, 400),
    "5.5 million empty lists": (INFER, lambda: gzip.compress(HEAD + b"[" + b"[]," * 5_500_000 + b"[]]}]}"), GZIP, 413),
    "lists in lists": (INFER, lambda: gzip.compress(HEAD + b"[" * 16_000_000), GZIP, 413),
    "a million lists in lists": (INFER, lambda: HEAD + b"[" * 1_000_000, {}, 413),
    "lists without a tensor": (INFER, lambda: gzip.compress(b'{"x": [' + b"[]," * 5_500_000 + b"[]]}"), GZIP, 413),
    "800,000 members of gzip": (INFER, lambda: gzip.compress(b"") * 800_000, GZIP, 400),
    "a name of 15 MB": (INFER, lambda: b'{"inputs": [{"name": "' + b"x" * 15_000_000 + b'"}]}', {}, 413),
    "a parameter with half a surrogate pair": (
        INFER, lambda: b'{"inputs": [7], "parameters": {"\\ud800": ["\\udfff"]}}', {}, 400),
    "a name with half a surrogate pair": (INFER, lambda: numbers(name="\ud800"), {}, 400),
    "top of 5,000 digits": ("/predict?top=" + "9" * 5000, lambda: NOT_AN_IMAGE, {}, 400),
    "a header of 5,000 digits": (INFER, lambda: b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400),
    "a form with only boundaries": ("/predict", lambda: b"--aaaa\r\n\r\n" + b"\r\n--aaa" * 2_200_000, FORM, 400),
    "a form of 50,000 files": ("/predict", lambda: PART * 50_000, FORM, 400),
    "16 MB of noise": ("/predict", lambda: np.random.default_rng(0).bytes(16_000_000), {}, 400),
}  # fmt: skip


def probe(health):
    health.request("GET", "/v2/health/live")
    assert health.getresponse().read() == b'{"live":true}'
    time.sleep(0.002)


def probe_during(port, work):
    """Return the rate of answered health probes during the work, relative to the rate without it.

    At 0.1 or more, nothing blocked the event loop for long. Return 1 if the work is too short for ten probes.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(keep_alive(port)) as health:
        started = time.perf_counter()
        for _ in range(50):
            probe(health)
        alone = 50 / (time.perf_counter() - started)
        started, count, done = time.perf_counter(), 0, pool.submit(work)
        while not done.done():
            probe(health)
            count += 1
        seconds = time.perf_counter() - started
        done.result()
    return count / seconds / alone if seconds * alone > 10 else 1.0


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_does_not_block_other_requests(port, kind):
    path, make_body, headers, expected = HOSTILE[kind]
    body = make_body()

    def work():
        status, _, answer = ask(port, path, body, headers)
        assert status == expected, answer[:300]
        assert len(answer) < 1000

    assert any(probe_during(port, work) > 0.1 for _ in range(2))


def test_chunks_of_one_byte_do_not_block_the_event_loop(port):
    def work():
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.sendall(b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
            assert b" 400 " in client.recv(1000)

    assert any(probe_during(port, work) > 0.1 for _ in range(2))


# ---- photographs --------------------------------------------------------------------------------------------------


def decoders(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def memory_mib(pid):
    """Return the peak memory of a process in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def test_large_photographs_share_a_budget_and_a_dead_decoder_is_replaced(artefact):
    large, middle = png(8_000, 7_999), png(3_000, 3_000)
    with server(artefact) as (process, port), concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(port, "/predict", large), range(20)))
        assert {status for status, _, _ in answers} == {200, 503}
        assert "pixels" in next(json.loads(body)["error"] for status, _, body in answers if status == 503)
        assert ask(port, "/predict", large)[0] == 200  # the budget is free again
        # only one is decoded at a time: 64 MiB in grey, 256 MiB in colour
        assert memory_mib(process.pid) + sum(map(memory_mib, decoders(process))) < 800
        for child in decoders(process):  # an image that crashes Pillow ends it too
            os.kill(child, signal.SIGKILL)
        wait_until(lambda: ask(port, "/predict", middle)[0] == 200)
        assert ask(port, "/v2/health/ready")[0] == 200
        children = decoders(process)
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_the_body_of_a_client_that_has_left_is_freed_while_all_decoders_are_busy():
    metadata = images.Metadata(["a"], [3, 16, 16], [0.5] * 3, [0.2] * 3, "bilinear", 1.0)
    decoders = images.Decoders(1, ("PNG",), 2**26)
    slow, bodies = png(7_000, 7_000), [SMALL_JPEG + bytes([i]) for i in range(8)]
    before = list(map(sys.getrefcount, bodies))

    async def leave():
        busy = [asyncio.create_task(decoders.decode(slow, "", metadata)) for _ in range(2)]
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(decoders.decode(body, "", metadata)) for body in bodies]
        await asyncio.sleep(0.05)
        while waiting:
            waiting[-1].cancel()
            await asyncio.wait([waiting.pop()])
        assert not any(task.done() for task in busy)
        assert list(map(sys.getrefcount, bodies)) == before
        await asyncio.wait(busy)

    try:
        asyncio.run(leave())
    finally:
        decoders.close()


def test_a_motion_photo_is_classified(site):
    """Append 4 MB of a video, as Samsung's and Google's cameras do. Its bytes often contain the marker of a scan."""
    video = np.random.default_rng(0).bytes(2**22)
    assert video.count(b"\xff\xda") > 50
    file = io.BytesIO()
    Image.new("RGB", (6_000, 4_000)).save(file, "JPEG")
    assert ask(site, "/predict", file.getvalue() + video)[0] == 200


def test_the_scans_of_a_progressive_jpeg_are_counted():
    assert images.scans_of(jpeg_of_scans(30, 64)) == jpeg_of_scans(1, 64).count(b"\xff\xda") + 29
    assert images.scans_of(SMALL_JPEG) == 1
    assert images.scans_of(SMALL_JPEG[:-2]) == 1  # cut off


def test_decoding_has_a_limit_of_cpu_time(monkeypatch):
    metadata = images.Metadata(["a"], [3, 16, 16], [0.5] * 3, [0.2] * 3, "bilinear", 1.0)
    endless = SMALL_JPEG[:2] + b"\xff\xe0\0\2" * 3_000_000 + SMALL_JPEG[2:]
    monkeypatch.setattr(images, "DECODE_S", 0.2)
    handler = signal.signal(signal.SIGPROF, images.stop_decoding)
    started = time.process_time()
    try:
        with pytest.raises(images.RequestError) as error:
            images.decode_in_time(endless, "", metadata, ("JPEG",), 100_000)
    finally:
        signal.signal(signal.SIGPROF, handler)
    assert "takes more than 0 s of CPU" in error.value.message
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("accepted", "make", "side"), [("TIFF", tiff_of_one_tile, 16_384), ("BMP", bmp_rle, 8_000)])
def test_a_costly_file_of_an_allowed_format_does_not_stop_the_server(artefact, accepted, make, side):
    with in_process(artefact, Limits(formats=(accepted,))) as site:
        assert ask(site, "/predict", make(side))[0] in (200, 400)
        assert ask(site, "/predict", picture(accepted))[0] == 200


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_an_image_of_too_many_pixels_is_413(site, side):
    status, message = error_of(site, "/predict", png(side, side))
    assert (status, "too large" in message) == (413, True)


# ---- overload -----------------------------------------------------------------------------------------------------


async def crowd(port, count, seconds, request):
    """Send one request on each of many connections, and close them after some seconds."""
    await asyncio.gather(*(send_and_leave(port, seconds, request) for _ in range(count)))


async def send_and_leave(port, seconds, request):
    with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), seconds)
        finally:
            writer.transport.abort()


def test_a_client_does_not_wait_for_a_crowd_that_has_left(port):
    """Start 900 clients, which send one request each and leave after at most 2 seconds."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((2000, 1500)).save(file, "JPEG", quality=88)
    photo = file.getvalue()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(photo)
    assert ask(port, "/predict", photo)[0] == 200  # starts a decoder
    started = time.perf_counter()
    for _ in range(10):
        assert ask(port, "/predict", photo)[0] == 200
    alone = (time.perf_counter() - started) / 10
    asyncio.run(crowd(port, 900, 2.0, head + photo))
    started = time.perf_counter()
    assert ask(port, "/predict", photo)[0] in (200, 503)
    assert time.perf_counter() - started < max(1.0, 150 * alone)  # all 900 would take 450 * alone on two cores


def test_requests_of_clients_that_have_left_are_not_run(artefact):
    gate, sizes = [], []

    def slow(batch):
        sizes.append(len(batch))
        while not gate:
            time.sleep(0.01)
        return np.zeros((len(batch), 7), np.float32)

    with in_thread(artefact, Limits(max_batch=1), run=slow) as port:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for client in clients:
            client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: 0\r\nContent-Length: %d"
                           b"\r\n\r\n" % (INFER.encode(), ONE) + bytes(ONE))  # fmt: skip
        wait_until(lambda: metric(port, "kdlite_queue_images") == 19)
        for client in clients:
            client.close()
        wait_until(lambda: metric(port, "kdlite_queue_images") == 0)
        gate.append(True)
        assert ask(port, INFER, numbers())[0] == 200
        assert len(sizes) == 2
        assert metric(port, 'kdlite_requests_total{endpoint="infer",status="499"}') == 20


def test_requests_of_clients_that_have_left_are_not_unpacked(port):
    """Start 200 clients, which send one request each and leave after the time of 20 requests."""
    body = gzip.compress(bytes(15 * MIB))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    started = time.perf_counter()
    for _ in range(5):
        assert ask(port, INFER, body, GZIP)[0] == 413  # too large for JSON
    alone = (time.perf_counter() - started) / 5
    asyncio.run(crowd(port, 200, 20 * alone, head.encode() + body))
    started = time.perf_counter()
    assert ask(port, INFER, body, GZIP)[0] in (413, 503)
    assert time.perf_counter() - started < max(1.0, 30 * alone)  # so most requests were not unpacked


def test_bodies_share_a_budget(artefact):
    with in_thread(artefact, Limits(body_mib=1.0, bodies=3)) as port:
        uploads = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for upload in uploads:
            upload.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(900_000))
        answered = []
        for upload in uploads:
            upload.settimeout(0.5)
            try:
                answered.append(upload.recv(1000))
            except TimeoutError:
                answered.append(b"")
        assert sum(b" 503 " in answer for answer in answered) == 1
        assert sum(answer == b"" for answer in answered) == 3
        for upload in uploads:
            upload.close()
        wait_until(lambda: ask(port, "/predict", bytes(1_000_000))[0] == 400)  # the body is read, but it is no image


# ---- slow clients -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(artefact):
    with in_thread(artefact, Limits(headers_s=1.0, body_s=1.0, idle_s=1.0)) as port:
        yield port


@pytest.mark.parametrize(("begin", "more", "answer"), [
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n", b" 408 "),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x", b" 408 "),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", b" 408 "),
    (b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x", b" 405 "),  # answered before the body ends
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", b"", b" 200 "),
    (b"", b"", b""),
], ids=["headers", "body", "chunks", "body that is not read", "idle", "silent"])  # fmt: skip
def test_a_slow_client_is_disconnected_and_gets_an_answer_to_what_it_began(impatient, begin, more, answer):
    with socket.create_connection(("127.0.0.1", impatient)) as client:
        client.settimeout(0.1)
        started, received = time.monotonic(), b""
        client.sendall(begin)
        while time.monotonic() - started < 10:
            try:
                if more:
                    client.sendall(more)
                part = client.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            received += part
        assert 0.9 < time.monotonic() - started < 8
        assert answer in received
        assert received.count(b"HTTP/1.1") == bool(answer)


def test_a_client_that_keeps_sending_requests_is_not_disconnected(impatient):
    client = keep_alive(impatient)
    started = time.monotonic()
    while time.monotonic() - started < 3:
        client.request("POST", "/predict", bytes(300_000))
        assert client.getresponse().read()
    client.close()


def test_a_client_that_reads_no_answers_is_disconnected(impatient):
    with socket.create_connection(("127.0.0.1", impatient)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.2)

        def ask_on():
            with contextlib.suppress(TimeoutError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            return False

        with pytest.raises(ConnectionError):
            wait_until(ask_on)


def test_idle_connections_are_closed_when_there_are_too_many(artefact):
    with in_thread(artefact, Limits(connections=20)) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        assert ask(port, "/v2/health/ready")[0] == 200
        wait_until(lambda: metric(port, 'kdlite_connections_closed_total{why="limit"}') >= 40)
        for connection in idle:
            connection.close()


def test_a_connection_over_the_limit_gets_503_if_all_others_have_requests(artefact):
    with in_thread(artefact, Limits(connections=3)) as port:
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


def test_a_lack_of_file_descriptors_is_logged_at_most_once_and_requests_are_answered(artefact):
    with server(artefact, prefix=("prlimit", "--nofile=200")) as (process, port):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for _ in range(20):
            assert ask(port, "/v2/health/ready")[0] == 200
        for connection in idle:
            connection.close()
        process.terminate()
        lines = process.communicate(timeout=30)[1].splitlines()
        assert lines[0] == "136 connections, not 1024: ulimit -n is 200"
        assert len(lines) <= 2


# ---- HTTP ---------------------------------------------------------------------------------------------------------


def talk(port, sent):
    """Return the server's answer up to a second of silence, and whether it closed the connection."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(sent)
        client.settimeout(1)
        answer = b""
        with contextlib.suppress(TimeoutError):
            while part := client.recv(1000):
                answer += part
        return answer, part == b""


@pytest.mark.parametrize("sent", [
    b"NONSENSE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
], ids=["words", "TLS", "a chunk without a size", "gzip as framing", "two lengths", "a negative length"])  # fmt: skip
def test_invalid_http_gets_an_error_in_json(port, sent):
    answer, closed = talk(port, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|501) ", head)
    assert "error" in json.loads(body)
    assert closed


def test_a_request_with_a_length_and_chunks_closes_its_connection(port):
    answer, closed = talk(port, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked"
                                b"\r\n\r\n0\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")  # fmt: skip
    assert closed
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


def test_a_request_for_a_whole_url_is_answered(port):
    for target, status in ((b"http://example.com/v2/health/live", b" 200 "), (b"HTTPS://a:1", b" 200 "),
                           (b"http://a/nowhere", b" 404 ")):  # fmt: skip
        answer, _ = talk(port, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status in answer.partition(b"\r\n")[0] + b" "
