"""Hold the rules of all commands. A user's mistake prints one line and exits with status 2. A file is written
completely or not at all.

This module imports only the standard library, so that a command prints a mistake in its flags at once, also
without numpy or torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

# Errors of a full or read-only disk.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
MAX_JSON = 64 << 20  # largest config.json, or .json next to an artefact, in bytes; 100,000 labels take 3 MB
# Control characters, which a terminal obeys, and the marks that change the direction of a text.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """Report a user's mistake: one line on stderr and exit status 2, without a traceback."""


Run = Callable[[argparse.Namespace], "int | None"]  # a command: takes its flags, returns its exit status; None: 0
_quiet = False  # parse_and_run() sets it while a command runs


# ---- flags ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parse flags like argparse, but raise UserError for a mistake. Expand ~/ in --output=~/run too, unlike a shell."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args, home = sys.argv[1:] if args is None else args, os.path.expanduser("~/")
        args = [re.sub("^(--[^=]+=)?~/", lambda m: (m[1] or "") + home, text) for text in args]
        return super().parse_known_args(args, namespace)

    def add_shared(self, *names: str) -> None:
        for name in names:
            self.add_argument(name, **SHARED[name])


def make_parser(doc: str | None, name: str, *shared: str) -> Parser:
    """Return a parser with flags of SHARED. doc: text of --help; name: a command of deploy/, or a script's file."""
    prog = f"python -m deploy.{name}" if "." not in name else name
    parser = Parser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_shared(*shared)
    return parser


LARGEST = 2.0**63  # no number of a flag or of a file is larger


def number(
    kind: type, low: float, high: float = math.inf, above: bool = False, or_zero: bool = False
) -> Callable[[str], Any]:
    """Return the type of a flag: a finite number from low to high.

    above: low itself is not allowed; or_zero: 0 is allowed too
    """
    return functools.partial(read_number, kind, low, high, above, or_zero)


def read_number(kind: type, low: float, high: float, above: bool, or_zero: bool, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if or_zero and value == 0:
        return value
    if not (low <= value <= min(high, LARGEST)) or (above and value == low):
        span = f"between {low} and {high}" if high < math.inf else f"at least {low}"
        if above:
            span = f"greater than {low}" + (f" and at most {high}" if high < math.inf else "")
        span = f"0, or {span}" if or_zero else span
        span = f"at most {LARGEST:g}" if LARGEST < value < math.inf == high else span
        if value != value:  # NaN; math.isnan raises an error for a huge int
            span = f"a number and {span}"
        raise argparse.ArgumentTypeError(f"must be {span}, got {text[:80]}")
    return value


SHARED: dict[str, dict[str, Any]] = {
    "student": dict(type=Path, help="a run's student/ folder, or the run directory"),
    "--quiet": dict(action="store_true", help="print only results, without remarks and progress"),
    "--json": dict(action="store_true", help="print the content of the .json file and nothing else"),
    "--reference": dict(type=Path, help="the reference file (default: reference.npz of the run directory)"),
    "--device": dict(
        choices=["auto", "cpu", "cuda", "tensorrt"],
        default="auto",
        help="where to run; auto: a CUDA device if there is one. tensorrt: ONNX Runtime's TensorRT provider, for .onnx "
        "(default: auto)",
    ),
    "--allow-fallback": dict(
        action="store_true", help="run on the CPU if --device is unavailable, instead of an error"
    ),
    "--threads": dict(
        type=number(int, 0),
        default=0,
        help="CPU threads of a runtime; 0: one for each CPU that this process may use, by its affinity and its "
        "container's quota (default: 0)",
    ),
    "--model-file": dict(
        metavar="FILE.py:FUNCTION", help="Python file and function that build your own model; the command runs the file"
    ),
}
DEVICE = ("--device", "--allow-fallback", "--threads", "--model-file")  # deploy.runtimes.RunOn.from_args reads them


def add_device(parser: Parser) -> None:
    parser.add_shared(*DEVICE)


# ---- errors and the exit status ------------------------------------------------------------------------------------


def run_command(program: str, function: Callable[[], int | None]) -> int:
    """Call a program's function and return its exit status. Print an error as one line if `explain` returns one.

    The status is 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if the reader of
    stdout ends first (`| head`), and otherwise the function's. Other errors keep their traceback.
    """
    prepare_streams()
    try:
        with signals_as_exit():
            return function() or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_lost_reader(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
            return 141
        message = explain(error)
        if message is None:
            raise
        show_error(program, message)
        return 2


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Turn SIGTERM, and SIGHUP of a lost terminal, into SystemExit, so that `replacing` removes its folder.

    A program's own handler stays, and an ignored signal (nohup) stays ignored.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names if threading.current_thread() is threading.main_thread()]
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, exit_by_signal)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is exit_by_signal:
                signal.signal(number, signal.SIG_DFL)


def exit_by_signal(number: int, _: Any) -> None:
    sys.exit(128 + number)


def command(parser: Parser, run: Run, argv: list[str] | None = None) -> int:
    """Parse the command line, call `run` with the flags, and return the exit status."""
    return run_command(parser.prog, functools.partial(parse_and_run, parser, run, argv))


def parse_and_run(parser: Parser, run: Run, argv: list[str] | None) -> int | None:
    global _quiet
    args = parser.parse_intermixed_args(argv)  # files may come after flags
    _quiet = getattr(args, "quiet", False) or getattr(args, "json", False)
    try:
        return run(args)
    finally:
        _quiet = False


def explain(error: Exception, advice: str = "") -> str | None:
    """Return one line for an error that the user or the machine causes, and None for any other error.

    advice: more text for the line if memory ran out
    """
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and (error.errno in WRITE_ERRORS or error.errno == errno.ENAMETOOLONG):
        return f"cannot read or write: {text}"
    advice = f"; {advice}" if advice else ""
    if type(error).__name__ == "OutOfMemoryError":  # torch's exception, by name because torch may be missing
        return f"out of GPU memory: use smaller batches{advice}; {text[:200]}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return f"out of memory: use smaller batches{advice}; {text[:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    cut_off = isinstance(error, (EOFError, ConnectionError)) and any("dataloader" in f.filename for f in frames)
    if cut_off or (isinstance(error, RuntimeError) and "DataLoader worker" in text):  # torch's message
        fewer = f"use fewer data loading processes{advice}"
        return f"a data loading process ended, perhaps because memory ran out: {fewer}; {text[:200]}"
    return None


def is_lost_reader(error: Exception) -> bool:
    """Return whether print() failed because the reader of stdout has ended.

    A broken pipe between data loading processes raises the same error, and does not count.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, BrokenPipeError) and "multiprocessing" not in frames[-1].filename


def show_error(program: str, message: str) -> None:
    """Print one line on stderr. With KDLITE_TRACEBACK=1, print the exception's traceback first."""
    if os.environ.get("KDLITE_TRACEBACK") == "1":
        traceback.print_exc()
    print(printable(f"{program}: error: {message}"), file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@contextlib.contextmanager
def needs(install: str, name: str = "") -> Iterator[None]:
    """Turn an ImportError in the body into UserError.

    install: how to install the package; name: the __name__ of the module that imports; if it is "__main__", print the
        error and exit with status 2
    """
    try:
        yield
    except ImportError as error:
        message = f"{error}: {install}"
        if name != "__main__":
            raise UserError(message) from error
        show_error(f"python -m deploy.{Path(sys.argv[0]).stem}", message)
        sys.exit(2)


def need(module: str, install: str) -> ModuleType:
    """Import a module that some machines lack; raise UserError with `install` if it is missing."""
    with needs(install):
        return importlib.import_module(module)


# ---- printing ------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return a text with its control characters escaped, because labels and file names may come from other people."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def prepare_streams() -> None:
    """Make stdout and stderr accept every text.

    They escape characters that the locale's encoding lacks, instead of raising an error. A stream that the caller
    closed, as some init scripts do, becomes the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(*lines: str) -> None:
    """Print results on stdout, with the control characters of each line escaped."""
    print(*(printable(line) for text in lines for line in text.split("\n")), sep="\n", flush=True)


def log(text: str) -> None:
    """Print a remark on stdout, unless --quiet or --json asks for results only."""
    if not _quiet:
        show(text)


@dataclass
class ProgressBar:
    """Iterate over things and show the progress on stderr: tqdm's bar on a terminal, otherwise a line now and then."""

    things: Iterable[Any]
    label: str  # a word or two
    total: int | None = None  # number of units; None: len(things) * each if things have a length
    each: int = 1  # units per thing, such as images per batch
    first: int = 0  # things done before a resume
    unit: str = ""
    shown: bool = True  # False in every process except one
    postfix: str = ""  # printed after the rate, such as the loss

    # Shortest and longest time between two lines, in seconds. Within these limits it is a quarter of the elapsed time.
    GAP_S: ClassVar = 30.0, 600.0

    def __iter__(self) -> Iterator[Any]:
        self.shown = self.shown and not _quiet
        if self.total is None and isinstance(self.things, Sized):
            self.total = len(self.things) * self.each
        bar = self.make_bar()
        started = printed = time.monotonic()
        try:
            for count, thing in enumerate(self.things, 1):
                yield thing
                now = time.monotonic()
                if bar is not None:
                    bar.set_postfix_str(self.postfix, refresh=False)
                    bar.update(min(self.each, self.total - bar.n) if self.total else self.each)
                elif self.shown and now - printed >= min(max((now - started) / 4, self.GAP_S[0]), self.GAP_S[1]):
                    printed = now
                    print(printable(self.line(count, now - started)), file=sys.stderr, flush=True)
        finally:
            if bar is not None:
                bar.close()

    def make_bar(self) -> Any:
        """Return tqdm's bar. Return None if tqdm or a terminal is missing, or if `shown` is False."""
        if not self.shown or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
            return None
        bar, done = importlib.import_module("tqdm").tqdm, self.first * self.each
        unit = f" {self.unit}" if self.unit else "it"
        return bar(total=self.total, desc=printable(self.label), initial=done, leave=False, unit=unit)

    def line(self, count: int, seconds: float) -> str:
        done, rate = (self.first + count) * self.each, count * self.each / seconds
        parts = [f"{self.label}: {done:,}", f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", self.postfix]
        unit = f" {self.unit}" if self.unit else ""
        parts[1] += f"{unit} a second"
        if self.total:
            parts[0] = f"{self.label}: {min(done, self.total):,} of {self.total:,}{unit}"
            parts.insert(2, f"{max(0.0, self.total - done) / rate / 60:.1f} min left")
        return ", ".join(filter(None, parts))


# ---- files ---------------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed": kdlite may run without installation."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def is_code(name: Any) -> bool:
    """Return whether a value is path/to/file.py:function."""
    return isinstance(name, str) and re.fullmatch(r".+\.py:\w+", name) is not None


def student_folder(path: Path) -> Path:
    """Return the student/ folder of a path. path: a run directory, or the student/ folder itself."""
    folder = path / "student" if (path / "student").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is neither a student/ folder nor a run directory: it has no config.json")
    return folder


def file_of(student: Path, name: str) -> Path:
    """Return the path of a file that a flag names. If the name has no /, look in the student's folder first."""
    inside = student / name  # for an absolute name: this name, with the type of student (PackedPath in a .pyz)
    return inside if (os.sep not in name or os.path.isabs(name)) and inside.is_file() else Path(name)


def make_folder(folder: Path) -> None:
    """Make a folder if it is missing; raise UserError if files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another folder with --output") from error


def read_file(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file; raise UserError if it is unreadable, larger than `most` bytes, or a pipe."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        if most is not None and path.stat().st_size > most:
            raise UserError(f"{path} has {path.stat().st_size} bytes, more than {most}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot, or is __MACOSX, a folder that macOS adds to zip files."""
    return name.startswith(".") or name == "__MACOSX"


def files_in(folder: Path) -> Iterator[str]:
    """Yield the files of a folder and its subfolders, without hidden ones (is_hidden); follow links.

    Raise UserError for a subfolder that cannot be read, or that is a link to a folder that contains it. os.walk and
    Path.rglob skip an unreadable folder without an error, and Path.rglob skips links to folders. os.walk follows a
    link to a folder that contains this link 40 times.
    """
    waiting = [(str(folder), frozenset([os.path.realpath(folder)]))]
    while waiting:
        path, around = waiting.pop()
        try:
            with os.scandir(path) as entries:
                shown = [entry for entry in entries if not is_hidden(entry.name)]
                files = [entry.path for entry in shown if entry.is_file()]
                inside = [entry.path for entry in shown if entry.is_dir()]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; change its permissions or move it") from error
        yield from files
        for inner in inside:
            real = os.path.realpath(inner)
            if real in around:
                raise UserError(f"{inner} is a link to a folder that contains it: remove the link")
            waiting.append((inner, around | {real}))


def refuse_special(path: Path) -> None:
    """Raise UserError if a path to write is a device, a pipe or a link to one: a new file would replace it."""
    if (path.exists() and not path.is_file() and not path.is_dir()) or os.path.realpath(path.parent) == "/dev":
        raise UserError(f"cannot write {path}: it is not a regular file; name another file")


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a path in a new folder next to `path`; the file or folder written there replaces `path` at the end.

    The new folder has an unpredictable name and is private, so that no other user can put a link there to redirect the
    write. If the body raises an error, `path` is unchanged and the new folder is removed. A full or read-only disk, and
    a device or pipe at `path`, raise UserError.

    path: a file, or a folder that does not exist yet; keep: rename an existing `path` to this name; None: replace it
    """
    refuse_special(path)
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
        former = "; the old file is kept" if path.exists() else ""
        raise UserError(f"could not save {path}: {error.strerror or error}{former}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: Any, keep: Path | None = None) -> None:
    """Write text or bytes to a file atomically: after a failure the file has its old content. keep: see `replacing`"""
    with replacing(path, keep) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
