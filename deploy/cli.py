"""What every command shares: a user's mistake is one line and status 2, and a file is whole or not there.

Imports nothing but the standard library, so that a command which fails fails at once, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import importlib.metadata
import math
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# What a full, read-only or foreign disk answers a write with.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class UserError(Exception):
    """An error of the user's: one line on stderr and exit status 2, no traceback."""


_quiet = False  # command() sets it while it runs


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """~/ is the home folder also where a shell leaves it: in --output=~/run, or quoted."""
        args, home = sys.argv[1:] if args is None else args, os.path.expanduser("~/")
        args = [re.sub("^(--[^=]+=)?~/", lambda m: (m[1] or "") + home, text) for text in args]
        return super().parse_known_args(args, namespace)


def make_parser(doc: str | None, name: str) -> Parser:
    """A parser whose --help is the module's docstring; name: of a command of deploy/, or a script's file name."""
    return Parser(
        prog=f"python -m deploy.{name}" if "." not in name else name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def number(
    kind: type, low: float, high: float = math.inf, above: bool = False, or_zero: bool = False
) -> Callable[[str], Any]:
    """The type of a flag: a finite number from low to high, or above low, or 0."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if or_zero and value == 0:
            return value
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            span = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            span = f"0, or {span}" if or_zero else span
            raise argparse.ArgumentTypeError(f"must be {f'greater than {low}' if above else span}, got {text}")
        return value

    return read


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto",
                        help="where to run; auto: a CUDA device if there is one. tensorrt: ONNX Runtime's TensorRT "
                        "provider, for .onnx (default: auto)")  # fmt: skip
    parser.add_argument("--allow-fallback", action="store_true",
                        help="run on the CPU if --device is unavailable, instead of an error")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a runtime; 0: its own choice")
    add_model_file(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="results alone: no remarks, no progress")


def add_json(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print what {name} holds, and nothing else")


def add_model_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-file", metavar="FILE.py:FUNCTION",
                        help="what builds a student that is a model of your own; runs that file")  # fmt: skip


def run_command(program: str, function: Callable[[], int | None]) -> int:
    """Call a program's function and return its exit status: the one place where an exception becomes a line on stderr.

    Returns:
        The function's own status or 0; 2 for a user's mistake; 130 for Ctrl-C

    Raises:
        Exception: any error that `explain` has no line for, with its traceback
    """
    use_backslashreplace()
    try:
        return function() or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        show_error(program, message)
        return 2


def command(parser: Parser, run: Callable[[argparse.Namespace], int | None], argv: list[str] | None = None) -> int:
    """Parse the command line, call `run` with the flags, and return the exit status."""
    return run_command(parser.prog, functools.partial(parse_and_run, parser, run, argv))


def parse_and_run(
    parser: Parser, run: Callable[[argparse.Namespace], int | None], argv: list[str] | None
) -> int | None:
    global _quiet
    args = parser.parse_intermixed_args(argv)  # files may come after flags
    for name in ("threads", "workers"):
        if (getattr(args, name, None) or 0) < 0:
            raise UserError(f"--{name} must be at least 0, got {getattr(args, name)}")
    _quiet = getattr(args, "quiet", False) or getattr(args, "json", False)
    try:
        return run(args)
    finally:
        _quiet = False


def use_backslashreplace() -> None:
    """Let stdout and stderr escape characters that the locale's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    """Print a remark on stdout, unless --quiet or --json asks for results alone."""
    if not _quiet:
        print(text, flush=True)


class ProgressBar:
    """A loop that says on stderr how far it is: a bar on a terminal, elsewhere a line at times, less and less often.

    Args:
        things: the iterable
        what: the label, a word or two
        total: units in all; None: len(things) * each, where things have a length
        each: units of a thing, such as the images of a batch
        first: things already done, before a resume
        unit: the unit's name
        shown: False in all processes but one
    """

    GAP_S = 30.0, 600.0  # between two lines: at least, at most, and in between a quarter of the time so far

    def __init__(
        self, things: Iterable[Any], what: str, total: int | None = None, each: int = 1, first: int = 0,
        unit: str = "", shown: bool = True,
    ) -> None:  # fmt: skip
        self.things, self.what, self.each, self.first = things, what, each, first
        self.unit = f" {unit}" if unit else ""
        self.total = len(things) * each if total is None and isinstance(things, Sized) else total
        self.shown = shown and not _quiet
        self.beside = ""  # what else is told, such as the loss

    def __iter__(self) -> Iterator[Any]:
        if not self.shown:
            yield from self.things
            return
        bar = self.make_bar()
        began = said = time.monotonic()
        least, most = self.GAP_S
        try:
            for count, thing in enumerate(self.things, 1):
                yield thing
                now = time.monotonic()
                if bar is not None:
                    bar.set_postfix_str(self.beside, refresh=False)
                    bar.update(min(self.each, self.total - bar.n) if self.total else self.each)
                elif now - said >= min(max((now - began) / 4, least), most):
                    said = now
                    print(self.line(count, now - began), file=sys.stderr, flush=True)
        finally:
            if bar is not None:
                bar.close()

    def make_bar(self) -> Any:
        """tqdm's, on a terminal of a machine that has it."""
        if not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        initial = self.first * self.each
        return tqdm(total=self.total, desc=self.what, initial=initial, leave=False, unit=self.unit or "it")

    def line(self, count: int, seconds: float) -> str:
        done, rate = (self.first + count) * self.each, count * self.each / seconds
        per_second = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        parts = [f"{self.what}: {done:,}", f"{per_second}{self.unit} a second", self.beside]
        if self.total:
            parts[0] = f"{self.what}: {min(done, self.total):,} of {self.total:,}{self.unit}"
            parts[2:2] = [f"{max(0.0, self.total - done) / rate / 60:.1f} min left"]
        return ", ".join(filter(None, parts))


class Terminal:
    """stdout or stderr that may die (a closed pipe, a terminal that is gone) while the program goes on.

    log: a file that gets the same lines
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.dead = stream, False
        self.log: Any = None

    def write(self, text: str) -> int:
        if self.log and "\r" not in text:  # which is a progress bar's
            with contextlib.suppress(OSError):
                self.log.write(text)
        self.tell(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        if self.log:
            with contextlib.suppress(OSError):
                self.log.flush()
        self.tell(self.stream.flush)

    def tell(self, what: Callable[[], Any]) -> None:
        if self.dead:
            return
        try:
            what()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self.dead = True
            with contextlib.suppress(Exception):  # else the interpreter fails when it flushes at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def terminals() -> Iterator[list[Terminal]]:
    """stdout and stderr as Terminals."""
    use_backslashreplace()
    before = sys.stdout, sys.stderr
    both = [Terminal(stream) for stream in before]
    sys.stdout, sys.stderr = both  # type: ignore[assignment]
    try:
        yield both
    finally:
        sys.stdout, sys.stderr = before
        for terminal in both:
            if terminal.log:
                terminal.log.close()


def show_error(program: str, message: str) -> None:
    """One line on stderr; with KDLITE_TRACEBACK=1, before it, the traceback of the exception being handled."""
    if os.environ.get("KDLITE_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str | None:
    """One line for an error that is not the program's own, None for one that deserves its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return f"cannot read or write: {text}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be installed here
        return (
            "out of GPU memory: a smaller batch (train.py: --batch-size, --grad-accum, leave out --cache device; "
            f"deploy/: --batches, --max-batch, --workspace); {text[:200]}"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        advice = "a smaller batch (train.py: also fewer --workers, leave out --cache device)"
        return f"out of memory: {advice}; {text[:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    cut_off = isinstance(error, (EOFError, ConnectionError)) and any("dataloader" in f.filename for f in frames)
    if cut_off or (isinstance(error, RuntimeError) and "DataLoader worker" in text):
        return f"a data loading process died, perhaps for lack of memory: fewer --workers; {text[:200]}"
    return None


def first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def need(module: str, install: str) -> ModuleType:
    """Import a module that not every machine has."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: {install} ({error})") from error


def stop_without(error: ImportError, program: str, install: str) -> NoReturn:
    """End a command whose module cannot even be imported here."""
    show_error(f"python -m deploy.{program}", f"{error}: {install}")
    sys.exit(2)


def version(package: str) -> str:
    """The installed version of a package; kdlite's folders may also be used without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def student_folder(path: Path) -> Path:
    """The student/ folder that a path means: itself, or the one in a run directory."""
    folder = path / "student" if (path / "student").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no student/ folder and no run directory: it has no config.json")
    return folder


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; --output names another folder") from error


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Give a path in a new folder next to `path`; the file or folder written there replaces `path` at the end.

    The new folder has an unpredictable name and is this process's own, so nothing is written through a link. If the
    body raises, `path` is untouched and the new folder is removed.

    Args:
        path: a file, or a folder that does not exist yet
        keep: the path to which a former `path` is renamed

    Raises:
        UserError: the disk is full, read-only or another's
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}-", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise UserError(f"could not save {path}: {error.strerror}") from error
    try:
        partial = folder / path.name
        yield partial
        if not partial.is_dir():
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except OSError as error:
        former = "; the former one is kept" if path.exists() else ""
        raise UserError(f"could not save {path}: {error.strerror or error}{former}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: Any, keep: Path | None = None) -> None:
    """Write text or bytes to a file, which is the old one or the new one and never half of it; see `replacing`."""
    with replacing(path, keep) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
