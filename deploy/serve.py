"""Serve a student over HTTP: the Open Inference Protocol (V2) with dynamic batching, and labels of a photograph.

    python -m deploy.serve runs/001-mobilenet_v2-uskd/student/student.onnx
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/v2/models/student

GET / is a page to drop an image on. POST /v2/models/NAME/infer takes images as uint8 (N, H, W, 3), resized and cropped,
as JSON or as binary tensors. POST /predict takes an image file, or a form with one, and prepares it as in training.
/metrics is for Prometheus. An overloaded server responds 503 with Retry-After, to a body that is too large 413, and to
any other mistake in a request 4xx with {"error": ...}.

SIGTERM drains: readiness becomes 503, the server answers the requests that have begun, and ends within 20 seconds.
SIGHUP loads the file again, and keeps the old one if the new one does not run. On an address that other machines reach,
requests need the token of --token-file or KDLITE_TOKEN. For several models or machines, deploy.triton writes a
repository for Triton and KServe.
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
    number,
    stop_without,
)
from deploy.preprocess import FORMATS
from deploy.runtimes import RunOn

try:
    from deploy.server.app import REQUEST_ID, Limits, StudentServer, make_app
    from deploy.server.connections import bounded_by_files, listen, listen_unix, make_process, serve
    from deploy.server.log import log, start_log, stop_log
    from deploy.server.reload import Reloader, load_and_try
except ImportError as missing:
    stop_without(missing, "serve", "pip install starlette uvicorn prometheus-client")

TOKEN = "KDLITE_TOKEN"


def read_token(args: argparse.Namespace) -> str | None:
    """The token that clients must send; demanded where others than this machine's users may reach the server."""
    text = os.environ.get(TOKEN)
    if args.token_file:
        try:
            text = args.token_file.read_text(encoding="ascii")
        except (OSError, UnicodeError) as error:
            raise UserError(f"--token-file {args.token_file} cannot be read: {first_line(error)}") from error
    if text is None:
        if not args.no_token and not args.unix_socket and not is_loopback(args.host):
            raise UserError(
                f"--host {args.host} can be reached from outside: --token-file FILE or {TOKEN} says what clients must "
                "send as Authorization: Bearer TOKEN; --no-token serves whoever asks"
            )
        return None
    if args.no_token:
        raise UserError(f"--no-token, but there is one: leave out --token-file and {TOKEN}")
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
    parser.add_argument("artefact", type=Path, help="a student/ folder, or a .ts, .pt2, .onnx or .engine file of it")
    parser.add_argument("--name", default="student", help="the model's name in the protocol's paths (default: student)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for every interface (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--unix-socket", type=Path, metavar="PATH", help="listen there, and on no port")
    parser.add_argument("--token-file", type=Path, metavar="FILE",
                        help=f"the token that clients must send; the variable {TOKEN} may hold it instead")  # fmt: skip
    parser.add_argument("--no-token", action="store_true", help="serve whoever reaches --host without a token")
    parser.add_argument("--max-batch", type=number(int, 1, 2**16), default=default.max_batch,
                        help=f"images in one call of the runtime (default: {default.max_batch})")  # fmt: skip
    parser.add_argument("--max-delay", type=number(float, 0, 60_000), default=default.max_delay_ms,
                        help=f"milliseconds to wait for other requests (default: {default.max_delay_ms})")  # fmt: skip
    parser.add_argument("--queue", type=number(int, 1, 2**20), default=default.queue,
                        help=f"images that may wait; more get 503 (default: {default.queue})")  # fmt: skip
    parser.add_argument("--formats", type=read_formats, default=default.formats, metavar="NAMES",
                        help="that /predict reads, as in jpeg,png,tiff; more formats give a hostile file more ways to "
                        f"cost time (default: {','.join(default.formats).lower()})")  # fmt: skip
    parser.add_argument("--body-limit", type=number(float, 0, 2**12, above=True), default=default.body_mib,
                        help=f"MiB of a request's body; more gets 413 (default: {default.body_mib:.0f})")  # fmt: skip
    parser.add_argument("--connections", type=number(int, 1, 2**16), default=default.connections,
                        help=f"that may be open (default: {default.connections})")  # fmt: skip
    parser.add_argument("--drain", type=number(float, 0, 10), default=default.drain_s, metavar="SECONDS",
                        help="after SIGTERM, to go on answering with readiness at 503 before the listener closes "
                        f"(default: {default.drain_s:.0f})")  # fmt: skip
    parser.add_argument("--log", choices=["json"], help="a line for each request on stdout")
    add_device(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.queue < args.max_batch:
        raise UserError(f"--queue {args.queue} must be at least --max-batch, {args.max_batch}")
    if not args.name or "/" in args.name:
        raise UserError(f"--name {args.name!r} must be a part of a path")
    token, thread = read_token(args), start_log(as_json=args.log == "json")
    try:
        serve_file(args, token)
    finally:
        stop_log(thread)


def serve_file(args: argparse.Namespace, token: str | None) -> None:
    limits = Limits(
        args.max_batch, args.max_delay, args.queue, args.formats, args.body_limit,
        connections=bounded_by_files(args.connections), drain_s=args.drain,
    )  # fmt: skip
    name = f"{args.name}: {args.artefact}"
    load_again = functools.partial(load_and_try, args.artefact, limits.max_batch, RunOn.from_args(args))
    reloader = Reloader(load_again, name)
    server = StudentServer(load_again(), args.name, limits)
    listener = listen_unix(args.unix_socket) if args.unix_socket else listen(args.host, args.port)
    address = f"unix:{args.unix_socket}" if args.unix_socket else "http://{}:{}".format(*listener.getsockname()[:2])
    bound = identity(args.unix_socket)
    message = f"{name} by {server.runtime.name}, {server.runtime.provider}, on {address}"
    try:
        began = functools.partial(begin, server, reloader, message)
        serve(make_process(make_app(server, token), server, began), listener)
    finally:
        if (
            args.unix_socket and bound and bound == identity(args.unix_socket)
        ):  # not the socket of a server that has taken over
            args.unix_socket.unlink()


def identity(path: Path | None) -> tuple[int, ...]:
    """Return what differs between two files that have the same name one after the other."""
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
