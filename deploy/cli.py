"""What every command of deploy/ shares: its parser's first flags, and one line and status 2 for a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from train import Parser, UserError, explain


def make_parser(doc: str | None, name: str) -> Parser:
    """A parser whose --help is the module's docstring; name: of a command of deploy/, or a script's file name."""
    return Parser(
        prog=f"python -m deploy.{name}" if "." not in name else name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto",
                        help="where to run; auto: a CUDA device if there is one. tensorrt: ONNX Runtime's TensorRT "
                        "provider, for .onnx (default: auto)")  # fmt: skip
    parser.add_argument("--allow-fallback", action="store_true",
                        help="run on the CPU where --device is not to be had, instead of an error")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a runtime; 0: its own choice")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="as train.py --data (default: what the run's args.json says)")
    parser.add_argument("--data-dir", help="as train.py --data-dir (default: as --data)")
    parser.add_argument("--workers", type=int, help="processes that decode images (default: the cores; digits: none)")


def command(parser: Parser, run: Callable[[argparse.Namespace], int | None], argv: list[str] | None = None) -> int:
    """Parse and run. 0, or what run returns; 2 after one line on stderr for a user's mistake."""
    try:
        args = parser.parse_intermixed_args(argv)  # files may come after flags
        for name in ("threads", "workers"):
            if (getattr(args, name, None) or 0) < 0:
                raise UserError(f"--{name} must be at least 0, got {getattr(args, name)}")
        return run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"{parser.prog}: error: {message}", file=sys.stderr, flush=True)
        return 2


def student_folder(path: Path) -> Path:
    """The student/ folder that a path means: itself, or the one in a run directory."""
    folder = path / "student" if (path / "student").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no student/ folder and no run directory: it has no config.json")
    return folder
