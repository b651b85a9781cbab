"""Test deploy.serve in operation: drain, reload, log, metrics, token, unix socket, systemd."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from serving import (
    INFER,
    NAMES,
    ONE,
    RAW,
    ROOT,
    SHAPE,
    ask,
    binary,
    error_of,
    in_process,
    keep_alive,
    make_server,
    metric,
    numbers,
    of,
    picture,
    server,
    wait_until,
    write_artefact,
)

from deploy.cli import UserError, command
from deploy.serve import get_parser, identity, is_loopback, run
from deploy.server.connections import listen_unix
from deploy.server.reload import Reloader

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return another student of the same shape, with other labels."""
    return write_artefact(tmp_path_factory.mktemp("other"), [f"new {name}" for name in NAMES])


@pytest.fixture
def refused(artefact, capsys):
    """Return a function that runs deploy.serve, checks that it fails, and returns its one line on stderr."""

    def serve(*flags):
        assert command(get_parser(), run, [str(artefact), "--port", "0", "--device", "cpu", *map(str, flags)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        return line

    return serve


# ---- drain and signals --------------------------------------------------------------------------------------------


def test_a_drain_answers_each_client_once_more_and_closes_its_connection(artefact):
    with server(artefact, "--drain", "2", "--max-delay", "1500") as (process, port):
        clients = [keep_alive(port) for _ in range(64)]
        for client in clients:
            client.request("GET", "/v2")
            assert client.getresponse().read()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            begun = pool.submit(ask, port, INFER, numbers())
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: ask(port, "/v2/health/ready")[0] == 503)
            assert ask(port, "/v2/health/live")[0] == 200
            for client in clients:
                client.request("GET", "/v2/models/student")
                answer = client.getresponse()
                assert (answer.status, answer.headers["Connection"]) == (200, "close")
                answer.read()
            assert begun.result()[0] == 200
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))


def test_an_unread_log_and_stalled_clients_delay_the_end_by_less_than_20_seconds(artefact):
    with server(artefact, "--log", "json") as (process, port), contextlib.ExitStack() as clients:
        client = keep_alive(port)
        for _ in range(1500):  # 300 kB of log, more than a pipe holds
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read()
        open_files = len(os.listdir(f"/proc/{process.pid}/fd"))
        assert metric(port, "process_open_fds") == pytest.approx(open_files, abs=3)
        for stalled in (
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc",
            b"POST /predict HTTP/1.1\r\nHost: x\r\n",
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 5000,
        ):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.settimeout(1)
            with contextlib.suppress(TimeoutError):
                client.sendall(stalled)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - started < 20


def test_ctrl_c_and_a_second_sigterm_end_the_server_at_once(artefact):
    default_sigint = ("env", "--default-signal=INT")  # because a shell's background job ignores SIGINT
    with server(artefact, "--drain", "9", prefix=default_sigint) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    with server(artefact, "--drain", "9") as (process, _):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(5)


def test_warnings_and_lost_clients_are_not_logged_and_signals_do_not_end_a_decoder(artefact):
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x09\0"  # truncated
    with server(artefact, "--drain", "1", prefix=("setsid",)) as (process, port):
        for side in (9_500, 9_600, 9_700):  # Pillow warns above 89 million pixels
            assert ask(port, "/predict", picture("PNG", (side, side), mode="1"))[0] == 413
        assert ask(port, "/predict", picture("JPEG", exif=b"Exif\0\0" + exif))[0] == 200
        assert ask(port, "/predict", b"nonsense", {"Content-Type": "multipart/form-data; boundary=aaaa"})[0] == 400
        with socket.create_connection(("127.0.0.1", port)) as upload:  # a client that leaves
            upload.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        wait_until(lambda: metric(port, 'kdlite_requests_total{endpoint="predict",status="499"}') == 1)
        assert metric(port, 'kdlite_requests_total{endpoint="predict",status="500"}') == 0
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1:]
        os.kill(int(child), signal.SIGTERM)
        os.kill(int(child), signal.SIGHUP)
        os.killpg(process.pid, signal.SIGTERM)
        assert ask(port, "/predict", picture())[0] == 200
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


# ---- reload -------------------------------------------------------------------------------------------------------


def test_sighup_loads_the_file_again_without_losing_a_request_and_refuses_a_bad_file(artefact, other, tmp_path):
    served = Path(shutil.copy(artefact, tmp_path / "student.onnx"))
    bad = [b"", b"not a model", artefact.read_bytes()[:5000], None]
    with server(served) as (process, port), concurrent.futures.ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def ask_on(_):
            statuses = set()
            while not stop.is_set():
                statuses.add(ask(port, INFER, bytes(ONE), RAW)[0])
            return statuses

        asking = [pool.submit(ask_on, i) for i in range(4)]
        before = json.loads(ask(port, "/predict?top=1", picture())[2])["predictions"][0]["label"]
        shutil.copy(other, served)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(port, 'kdlite_reloads_total{result="done"}') == 1)
        after = json.loads(ask(port, "/predict?top=1", picture())[2])["predictions"][0]["label"]
        stop.set()
        assert [future.result() for future in asking] == [{200}] * 4
        assert not before.startswith("new ")
        assert after.startswith("new ")
        assert process.stdout.readline().endswith("loaded again\n")

        expected = ask(port, INFER, numbers())[2]
        for count, content in enumerate(bad, 1):
            served.unlink() if content is None else served.write_bytes(content)
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: metric(port, 'kdlite_reloads_total{result="refused"}') == count)  # noqa: B023
            assert ask(port, INFER, numbers())[2] == expected
        process.terminate()
        lines = process.communicate(timeout=30)[1].splitlines()
        assert [(str(served) in line, "keeps the old one" in line) for line in lines] == [(True, True)] * len(bad), (
            lines
        )


def test_sighup_during_a_load_loads_the_file_again(artefact):
    with server(artefact, slow_load=1.0) as (process, _):  # each load prints "loading"
        process.send_signal(signal.SIGHUP)
        lines = "".join(process.stdout.readline() for _ in range(3))
        assert "CPUExecutionProvider" in lines
        assert "loading\n" in lines
        assert "loaded again\n" in lines
        assert process.poll() is None


def test_reloads_do_not_overlap(artefact):
    site, running, counts = make_server(artefact), [], []

    def load_again():
        running.append(1)
        counts.append(len(running))
        time.sleep(0.02)
        running.pop()
        return site.runtime

    handler = signal.getsignal(signal.SIGHUP)
    try:
        reloader = Reloader(load_again, "x")
        for _ in range(5):
            reloader.on_signal(signal.SIGHUP, None)
        reloader.start(site)
        wait_until(lambda: len(counts) == 5)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert max(counts) == 1


# ---- log and metrics ----------------------------------------------------------------------------------------------


def test_the_json_log_has_only_lines_of_json(artefact, tmp_path):
    served, token = Path(shutil.copy(artefact, tmp_path / "student.onnx")), tmp_path / "token"
    token.write_text("s3cret\n")
    access = {"Authorization": "Bearer s3cret"}
    with server(served, "--log", "json", "--host", "0.0.0.0", "--token-file", token) as (process, port):
        assert ask(port, "/v2")[0] == 401
        raw = binary(of((3, *SHAPE), 3 * ONE), bytes(3 * ONE))
        answers = [
            ask(port, INFER, raw[0], raw[1] | access | {"X-Request-Id": "a-7"}),
            ask(port, "/predict", b"no image", access),
            ask(port, "/predict?top=1", picture(), access | {"X-Request-Id": "sp ace\x7f"}),
        ]
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(port, 'kdlite_reloads_total{result="done"}', access) == 1)
        served.write_bytes(b"")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(port, 'kdlite_reloads_total{result="refused"}', access) == 1)
        process.terminate()
        lines = [json.loads(line) for line in process.communicate(timeout=30)[0].splitlines()]
    messages = [line["message"] for line in lines if "message" in line]
    assert ["loaded again" in messages[0], "keeps the old one" in messages[1]] == [True, True]
    assert all(line["time"].endswith("+00:00") for line in lines)
    lines = [line for line in lines if line.get("method") == "POST"]
    assert [(line["method"], line["path"], line["status"], line["images"]) for line in lines] == [
        ("POST", INFER, 200, 3), ("POST", "/predict", 400, 0), ("POST", "/predict", 200, 1)]  # fmt: skip
    assert [line["request_id"] for line in lines] == [headers["X-Request-Id"] for _, headers, _ in answers]
    assert lines[0]["request_id"] == "a-7"
    assert len({line["request_id"] for line in lines}) == 3
    assert lines[2]["request_id"].isalnum()  # an id with invalid characters is replaced
    assert all(0 < line["ms"] < 60_000 for line in lines)


# ---- access -------------------------------------------------------------------------------------------------------


def test_all_paths_except_the_page_and_the_probes_need_the_token(artefact):
    with in_process(artefact, token="s3cret") as site:
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert ask(site, path)[0] == 200
        for path in ("/v2", "/metrics", "/v2/models/student", "/nowhere", "/v2/health/live/", "/predict"):
            assert error_of(site, path) == (401, "this server needs a token: Authorization: Bearer TOKEN")
        wrong = b"Bearer s3cre", b"Bearer s3crets", b"Basic s3cret", b"Bearer caf\xe9"
        for given in (b"", b"s3cret", b"Bearer", *wrong):
            status, headers, body = ask(site, INFER, numbers(), {"Authorization": given})
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert ("wrong token" if given in wrong else "needs a token") in json.loads(body)["error"]
        for given in ("Bearer s3cret", "bearer  s3cret"):
            assert ask(site, INFER, numbers(), {"Authorization": given})[0] == 200


def test_without_a_token_only_loopback_or_the_flag_no_token_is_accepted(artefact, refused, tmp_path, monkeypatch):
    for host in ("0.0.0.0", "::", "", "192.168.0.7", "example.org"):
        assert "--no-token" in refused("--host", host)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "visible ASCII" in refused("--token-file", empty)
    assert "cannot be read" in refused("--token-file", tmp_path / "none")
    monkeypatch.setenv("KDLITE_TOKEN", "t")
    assert "leave out" in refused("--no-token")


def test_the_loopback_needs_no_token():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "128.0.0.1")))


@pytest.mark.parametrize("flags", [
    ("--body-limit", "inf"), ("--body-limit", "nan"), ("--body-limit", "0"), ("--max-delay", "inf"),
    ("--max-delay", "nan"), ("--max-delay", "-1"), ("--max-batch", "0"), ("--port", "70000"), ("--drain", "nan"),
    ("--connections", "0"), ("--queue", "4"), ("--name", "a/b"), ("--formats", "jpeg,eps"), ("--formats", ""),
], ids=" ".join)  # fmt: skip
def test_a_flag_out_of_range_gives_one_line_that_names_it(refused, flags):
    assert flags[0] in refused(*flags)


def test_a_port_that_is_in_use_gives_one_line(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("--port", port)


# ---- a unix socket ------------------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


def status_of(path):
    client = UnixConnection(str(path))
    client.request("POST", INFER, numbers())
    status = client.getresponse().status
    client.close()
    return status


def test_a_unix_socket_is_served_handed_over_and_removed(artefact, refused, tmp_path):
    path = tmp_path / "kdlite.sock"
    with socket.socket(socket.AF_UNIX) as dead:  # a killed server leaves such a file
        dead.bind(str(path))
    with server(artefact, "--unix-socket", path) as (old, _):
        assert status_of(path) == 200
        assert "in use" in refused("--unix-socket", path)
        stalled = UnixConnection(str(path))  # so that the old server drains for some seconds
        stalled.connect()
        stalled.sock.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.3)
        old.terminate()
        new_flags = ["--unix-socket", str(path), "--device", "cpu", "--drain", "0"]
        path.unlink()  # a deployment does this while the old server drains
        with server(artefact, *new_flags) as (new, _):
            assert old.wait(20) == 0
            assert status_of(path) == 200
            new.terminate()
            assert new.wait(20) == 0
    assert not path.exists()
    path.write_text("mine")
    assert str(path) in refused("--unix-socket", path)
    assert path.read_text() == "mine"


def test_a_new_socket_with_the_same_inode_has_another_identity(tmp_path):
    path = tmp_path / "a.sock"
    first = listen_unix(path)
    before = identity(path)
    assert before == identity(path)
    with pytest.raises(UserError, match="in use"):
        listen_unix(path)
    first.close()  # its inode may be used again at once
    time.sleep(0.01)
    with listen_unix(path):
        assert identity(path) != before
    assert identity(tmp_path / "none") == ()


# ---- systemd ------------------------------------------------------------------------------------------------------


def test_the_steps_in_the_systemd_unit_install_each_file_that_it_uses():
    text = (ROOT / "examples/serve/kdlite.service").read_text()
    steps = "\n".join(line for line in text.splitlines() if line.startswith("#   "))
    for path in re.findall(r"/(?:opt|etc)/[\w/.-]+", "\n".join(set(text.splitlines()) - set(steps.splitlines()))):
        folder = "/opt/kdlite/venv"
        assert path in steps or (path.startswith(folder) and f"-m venv {folder}" in steps), path
    for made in ("requirements.txt", "student.pyz", "student.onnx"):
        assert made in steps
    command = re.search(r"ExecStart=(.*)", text.replace("\\\n", " "))[1].split()
    flags = command[command.index("serve") + 1 :]
    get_parser().parse_args(["student.onnx", *flags])
