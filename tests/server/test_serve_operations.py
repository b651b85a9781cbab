"""deploy.serve for those who run it: drain, reload, log, metrics, token, unix socket."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image
from serving import (
    INFER,
    NAMES,
    ONE,
    SHAPE,
    ask,
    binary,
    keep_alive,
    metric,
    of,
    server,
    tensor,
    wait_until,
    write_artefact,
)

from deploy.cli import command
from deploy.serve import get_parser, is_loopback, run

pytestmark = pytest.mark.slow  # each starts servers

BODY = json.dumps({"inputs": [tensor(data=[0] * ONE)]}).encode()
RAW = {"Inference-Header-Content-Length": "0"}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another student of the same shape, with other labels."""
    return write_artefact(tmp_path_factory.mktemp("other"), [f"new {name}" for name in NAMES])


def photo():
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def refused(artefact, capsys):
    """What stderr says of a command that cannot serve."""

    def serve(*flags):
        assert command(get_parser(), run, [str(artefact), "--port", "0", "--device", "cpu", *map(str, flags)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    return serve


# ---- the end ------------------------------------------------------------------------------------------------------


def test_a_drain_answers_each_client_once_more_and_closes_its_connection(artefact):
    with server(artefact, "--drain", "2") as (process, port):
        clients = [keep_alive(port) for _ in range(64)]
        for client in clients:
            client.request("GET", "/v2")
            assert client.getresponse().read()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(port, "/v2/health/ready")[0] == 503)
        assert ask(port, "/v2/health/live")[0] == 200
        for client in clients:
            client.request("POST", INFER, BODY)
            answer = client.getresponse()
            assert (answer.status, answer.headers["Connection"]) == (200, "close")
            answer.read()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc",
    b"POST /predict HTTP/1.1\r\nHost: x\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 5000,
], ids=["an upload", "headers", "answers that nobody reads"])  # fmt: skip
def test_a_drain_ends_within_20_seconds_whatever_stalls(artefact, stalled):
    with server(artefact) as (process, port), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):
            client.sendall(stalled)
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - started < 20


def test_ctrl_c_ends_at_once_and_the_second_signal_waits_for_nobody(artefact):
    with server(artefact, "--drain", "9") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    with server(artefact, "--drain", "9") as (process, _):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(5)


# ---- another model ------------------------------------------------------------------------------------------------


def test_sighup_changes_the_model_and_loses_no_request(artefact, other, tmp_path):
    served = shutil.copy(artefact, tmp_path / "student.onnx")
    with server(served) as (process, port), concurrent.futures.ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def ask_on(_):
            statuses = set()
            while not stop.is_set():
                statuses.add(ask(port, INFER, bytes(ONE), RAW)[0])
            return statuses

        asking = [pool.submit(ask_on, i) for i in range(4)]
        before = json.loads(ask(port, "/predict?top=1", photo())[2])["predictions"][0]["label"]
        shutil.copy(other, served)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(port, 'kdlite_reloads_total{result="done"}') == 1)
        after = json.loads(ask(port, "/predict?top=1", photo())[2])["predictions"][0]["label"]
        stop.set()
        assert [future.result() for future in asking] == [{200}] * 4
        assert not before.startswith("new ")
        assert after.startswith("new ")
        assert process.stdout.readline().endswith("loaded again\n")


def test_a_bad_file_changes_nothing_and_is_named(artefact, tmp_path):
    served = shutil.copy(artefact, tmp_path / "student.onnx")
    bad = [b"", b"no model", artefact.read_bytes()[:5000], None]
    with server(served) as (process, port):
        expected = ask(port, INFER, BODY)[2]
        for count, content in enumerate(bad, 1):
            served.unlink() if content is None else served.write_bytes(content)
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: metric(port, 'kdlite_reloads_total{result="refused"}') == count)  # noqa: B023
            assert ask(port, INFER, BODY)[2] == expected
        process.terminate()
        lines = process.communicate(timeout=30)[1].splitlines()
        assert [(str(served) in line, "keeps the old one" in line) for line in lines] == [(True, True)] * len(bad)


# ---- what it tells ------------------------------------------------------------------------------------------------


def test_the_log_has_a_line_of_json_for_each_request(artefact):
    with server(artefact, "--log", "json") as (process, port):
        raw = binary(of((3, *SHAPE), 3 * ONE), bytes(3 * ONE))
        answers = [
            ask(port, INFER, raw[0], raw[1] | {"X-Request-Id": "a-7"}),
            ask(port, "/predict", b"no image"),
            ask(port, "/predict?top=1", photo(), {"X-Request-Id": "sp ace\x7f"}),
        ]
        process.terminate()
        lines = [json.loads(line) for line in process.communicate(timeout=30)[0].splitlines()]
    assert [(line["method"], line["path"], line["status"], line["images"]) for line in lines] == [
        ("POST", INFER, 200, 3), ("POST", "/predict", 400, 0), ("POST", "/predict", 200, 1)]  # fmt: skip
    assert [line["request_id"] for line in lines] == [headers["X-Request-Id"] for _, headers, _ in answers]
    assert lines[0]["request_id"] == "a-7"
    assert len({line["request_id"] for line in lines}) == 3
    assert lines[2]["request_id"].isalnum()  # what cannot stand in a header or a line is not echoed
    assert all(0 < line["ms"] < 60_000 and line["time"].endswith("+00:00") for line in lines)


def test_a_log_that_nobody_reads_stops_no_request(artefact):
    with server(artefact, "--log", "json") as (process, port):
        client = keep_alive(port)
        for _ in range(1500):  # 300 kB, more than a pipe holds
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read()
        process.terminate()
        assert process.wait(20) == 0


def test_metrics_tell_of_the_process_and_of_queue_and_runtime(artefact):
    with server(artefact) as (process, port):
        for _ in range(5):
            ask(port, INFER, BODY)
        assert metric(port, 'kdlite_queue_seconds_count{model="student"}') == 5
        assert metric(port, 'kdlite_compute_seconds_count{model="student"}') == 5
        assert 0 < metric(port, 'kdlite_compute_seconds_sum{model="student"}') < 5
        assert metric(port, "process_resident_memory_bytes") > 20e6
        assert metric(port, "process_open_fds") == pytest.approx(len(os.listdir(f"/proc/{process.pid}/fd")), abs=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_readiness_fails_when_the_thread_of_the_runtime_has_died(artefact):
    from test_serve import in_this_process

    from deploy.runtimes import RunOn, load
    from deploy.server.app import Limits

    runtime = load(artefact, RunOn("cpu"))

    def end_the_thread(images):
        raise SystemExit

    object.__setattr__(runtime, "run", end_the_thread)
    with in_this_process(runtime, Limits()) as port:
        assert ask(port, "/v2/health/ready")[0] == 200
        assert ask(port, INFER, BODY)[0] == 500
        wait_until(lambda: ask(port, "/v2/health/ready")[0] == 503)
        assert ask(port, "/v2/models/student/ready")[0] == 503
        status, headers, body = ask(port, INFER, BODY)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "restart" in json.loads(body)["error"]
        assert ask(port, "/v2/health/live")[0] == 200


# ---- who may ask --------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_by_all_but_the_page_and_the_probes(artefact, tmp_path):
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    with server(artefact, "--token-file", file) as (_, port):
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert ask(port, path)[0] == 200
        for path in ("/v2", "/metrics", "/v2/models/student", "/nowhere", "//", "/v2/health/live/"):
            assert ask(port, path)[0] == 401
        for given in ("", "s3cret", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "Bearer caf\xe9"):
            status, headers, body = ask(port, INFER, BODY, {"Authorization": given})
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "token" in json.loads(body)["error"]
        for given in ("Bearer s3cret", "bearer  s3cret"):
            assert ask(port, INFER, BODY, {"Authorization": given})[0] == 200


def test_the_token_may_come_from_the_environment(artefact):
    with server(artefact, environment={"KDLITE_TOKEN": "t"}) as (_, port):
        assert ask(port, "/v2")[0] == 401
        assert ask(port, "/v2", headers={"Authorization": "Bearer t"})[0] == 200


def test_who_serves_other_machines_says_a_token_or_that_there_is_none(artefact, refused, tmp_path, monkeypatch):
    for host in ("0.0.0.0", "::", "", "192.168.0.7", "example.org"):
        assert "--no-token" in refused("--host", host)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "visible ASCII" in refused("--token-file", empty)
    assert "cannot be read" in refused("--token-file", tmp_path / "none")
    with server(artefact, "--host", "0.0.0.0", "--no-token") as (_, port):
        assert ask(port, "/v2")[0] == 200
    monkeypatch.setenv("KDLITE_TOKEN", "t")
    assert "leave out" in refused("--no-token")


def test_the_loopback_needs_no_token():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "128.0.0.1")))


@pytest.mark.parametrize("flags", [
    ("--body-limit", "inf"), ("--body-limit", "nan"), ("--body-limit", "0"), ("--max-delay", "inf"),
    ("--max-delay", "nan"), ("--max-delay", "-1"), ("--max-batch", "0"), ("--port", "70000"), ("--drain", "nan"),
    ("--connections", "0"), ("--queue", "4"), ("--name", "a/b"),
], ids=" ".join)  # fmt: skip
def test_a_flag_out_of_range_is_one_line_that_names_it(refused, flags):
    assert flags[0] in refused(*flags)


class UnixConnection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


def test_a_unix_socket_is_served_and_removed(artefact, refused, tmp_path):
    path = tmp_path / "kdlite.sock"
    with socket.socket(socket.AF_UNIX) as dead:  # left behind by a server that was killed
        dead.bind(str(path))
    with server(artefact, "--unix-socket", path) as (process, _):
        client = UnixConnection(str(path))
        client.request("POST", INFER, BODY)
        assert client.getresponse().status == 200
        client.close()
        assert "in use" in refused("--unix-socket", path)
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists()
    path.write_text("mine")
    assert str(path) in refused("--unix-socket", path)
    assert path.read_text() == "mine"


def test_logits_that_are_not_finite_are_told_and_not_a_traceback(artefact):
    from test_serve import in_this_process

    from deploy.runtimes import RunOn, load
    from deploy.server.app import Limits

    runtime = load(artefact, RunOn("cpu"))
    object.__setattr__(runtime, "run", lambda images: np.full((len(images), 7), np.nan, np.float32))
    with in_this_process(runtime, Limits()) as port:
        status, _, body = ask(port, "/predict", photo())
        assert (status, "not finite" in json.loads(body)["error"]) == (500, True)
        assert json.loads(ask(port, INFER, BODY)[2])["outputs"][0]["data"] == [None] * 7
