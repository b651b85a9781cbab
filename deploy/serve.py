"""Serve a student over HTTP: the Open Inference Protocol (V2) with dynamic batching, and labels for a photograph.

    python -m deploy.serve runs/001-mobilenet_v2-uskd/student/student.onnx
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/v2/models/student

GET / returns a page for a browser. POST /v2/models/NAME/infer takes images, uint8 (N, H, W, 3), resized and
cropped, as JSON or as binary tensors. POST /predict takes an image file, or a form with one, and prepares it as in
training. /metrics is for Prometheus. An overloaded server responds 503 with Retry-After. A body that is too large gets
413, and any other mistake in a request gets another 4xx; the response is {"error": ...}.

After SIGTERM, readiness is 503, and the server answers the requests that have begun and ends within 20 seconds. At
SIGHUP the server loads the file again, and keeps the old model if the new one does not run. On an address that other
machines reach, requests need the token of --token-file or KDLITE_TOKEN. For several models or machines, deploy.triton
writes a repository for Triton and KServe.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import os
import sys
from pathlib import Path

from deploy.cli import (
    Parser,
    UserError,
    add_device,
    command,
    first_line,
    make_parser,
    needs,
    number,
)
from deploy.preprocess import FORMATS
from deploy.runtimes import RunOn

with needs("pip install starlette uvicorn prometheus-client python-multipart", __name__):
    from deploy.server.app import REQUEST_ID, Limits, StudentServer, make_app
    from deploy.server.connections import bounded_by_files, listen, listen_unix, make_process, serve
    from deploy.server.log import log, start_log, stop_log
    from deploy.server.reload import Reloader, load_and_try

TOKEN = "KDLITE_TOKEN"


def read_token(args: argparse.Namespace) -> str | None:
    """Return the token that clients must send. Raise UserError if other machines can reach the server without one."""
    text = os.environ.get(TOKEN)
    if args.token_file:
        try:
            text = args.token_file.read_text(encoding="ascii")
        except (OSError, UnicodeError) as error:
            raise UserError(f"--token-file {args.token_file} cannot be read: {first_line(error)}") from error
    if text is None:
        if not args.no_token and not args.unix_socket and not is_loopback(args.host):
            raise UserError(
                f"other machines can reach --host {args.host}: set a token that clients must send, by --token-file "
                f"FILE or {TOKEN}, or serve without one by --no-token"
            )
        return None
    if args.no_token:
        raise UserError(f"--no-token contradicts --token-file and {TOKEN}: leave out one of them")
    if not REQUEST_ID.fullmatch(text.strip()):
        raise UserError(f"the token of {args.token_file or TOKEN} must be 1 to 128 visible ASCII characters")
    return text.strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_formats(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in text.split(","))
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0].lower()!r}; known: {', '.join(FORMATS).lower()}")
    return names


def get_parser() -> Parser:
    default = Limits()
    parser = make_parser(__doc__, "serve")
    add = parser.add_argument
    add("artefact", type=Path, help="a student/ folder, or a .ts, .pt2, .onnx or .engine file of it")
    add("--name", default="student", help="name of the model in the protocol's paths (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address; 0.0.0.0: every interface (default: %(default)s)")
    add("--port", type=int, default=8000, help="port; 0: any free port (default: %(default)s)")
    add("--unix-socket", type=Path, metavar="PATH", help="listen on a unix socket instead of a port")
    add("--token-file", type=Path, metavar="FILE", help=f"file with the clients' token (default: the variable {TOKEN})")
    add("--no-token", action="store_true", help="serve on an open --host without a token")
    for flag, kind, value, text in (
        ("--max-batch", number(int, 1, 2**16), default.max_batch, "images in one call of the runtime"),
        ("--max-delay", number(float, 0, 60_000), default.max_delay_ms, "milliseconds to wait for other requests"),
        ("--queue", number(int, 1, 2**20), default.queue, "images that wait or run; a request for more gets 503"),
        ("--formats", read_formats, ",".join(default.formats).lower(), "formats of photographs that /predict reads"),
        ("--body-limit", number(float, 0, 2**12, above=True), default.body_mib, "MiB of a body; a larger one gets 413"),
        ("--connections", number(int, 1, 2**16), default.connections, "open connections"),
        ("--drain", number(float, 0, 10), default.drain_s, "seconds after SIGTERM in which the server takes requests"),
    ):
        add(flag, type=kind, default=value, help=f"{text} (default: %(default)s)")
    add("--log", choices=["json"], help="print a line for each request on stdout")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.queue < args.max_batch:
        raise UserError(f"--queue {args.queue} must be at least --max-batch, {args.max_batch}")
    if not args.name or "/" in args.name:
        raise UserError(f"--name {args.name!r}: expected a name without /")
    token, thread = read_token(args), start_log(as_json=args.log == "json")
    try:
        serve_file(args, token)
    finally:
        stop_log(thread)


def serve_file(args: argparse.Namespace, token: str | None) -> None:
    limits = Limits(
        args.max_batch,
        args.max_delay,
        args.queue,
        args.formats,
        args.body_limit,
        connections=bounded_by_files(args.connections),
        drain_s=args.drain,
    )
    name = f"{args.name}: {args.artefact}"
    load_again = functools.partial(load_and_try, args.artefact, limits.max_batch, RunOn.from_args(args))
    reloader = Reloader(load_again, name)
    server = StudentServer(load_again(), args.name, limits)
    listener = listen_unix(args.unix_socket) if args.unix_socket else listen(args.host, args.port)
    if args.unix_socket:
        address = f"unix:{args.unix_socket}"
    else:
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    bound = identity(args.unix_socket)
    message = f"{name} by {server.runtime.name}, {server.runtime.provider}, on {address}"
    try:
        began = functools.partial(begin, server, reloader, message)
        serve(make_process(make_app(server, token), server, began), listener)
    finally:
        if bound and bound == identity(args.unix_socket):  # otherwise the socket is another server's
            args.unix_socket.unlink()


def identity(path: Path | None) -> tuple[int, ...]:
    """Return device, inode and time of a file, which show whether another file has replaced it."""
    try:
        found = os.stat(path or "")
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def begin(server: StudentServer, reloader: Reloader, message: str) -> None:
    log.info(message)
    reloader.start(server)


if __name__ == "__main__":
    sys.exit(command(get_parser(), run))
