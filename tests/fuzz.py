"""Search, guided by coverage, for input that makes kdlite's readers raise an undocumented error. Requires atheris.

    python tests/fuzz.py config --seconds 600         # config.json of a student, then a small image prepared with it
    python tests/fuzz.py run --seconds 600            # args.json and split.csv of a run directory
    python tests/fuzz.py labels --seconds 600         # a folder of a teacher's labels
    python tests/fuzz.py reference --seconds 600      # reference.npz
    python tests/fuzz.py checkpoint --seconds 600     # last.pt, with and without a valid checksum
    python tests/fuzz.py image --seconds 600          # an image, opened and prepared at 32 px
    python tests/fuzz.py request --seconds 600        # a request of the server's protocol, compressed or not
    python tests/fuzz.py photograph --seconds 600     # the body of a POST to /predict, as a file or as a form

The search starts from tests/corpus/TARGET. A finding is an undocumented exception, a hang or a crash of the
interpreter. The search stores one input for each faulty place in the code, under --output, and continues. The exit
status is 1 after a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
SEEDS = {"photograph": "image"}  # the folder in tests/corpus/, if its name differs from the target
LARGEST = {
    "config": 4096,
    "run": 4096,
    "labels": 2048,
    "reference": 2048,
    "checkpoint": 4096,
    "image": 8192,
    "request": 2048,
    "photograph": 8192,
}  # bytes of the largest input
SECONDS_A_RUN = 10
GIB_ADDRESSABLE = 8  # limit of the process, of which torch itself uses a part
MAX_PIXELS = 2_000_000  # instead of Pillow's 89 million, because larger images are slow
MAX_SIDE = 256  # with a larger input_size the target does not prepare an image


# ---- targets: each returns a function of bytes, whose exceptions are findings ----------------------------------------


def config_target(folder: Path) -> Callable[[bytes], None]:
    from PIL import Image

    from deploy.cli import UserError
    from deploy.config import read_config
    from deploy.preprocess import prepare

    photo = Image.new("RGB", (40, 30))

    def run(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        try:
            config = read_config(folder)
        except UserError as error:
            check_line(error)
            return
        _, height, width = config.input_size
        if max(height, width) <= MAX_SIDE and min(height, width) / config.crop <= MAX_SIDE:
            array = prepare(photo, config)
            assert array.shape == (height, width, 3), f"{array.shape} for input_size {config.input_size}"

    return run


def checkpoint_target(folder: Path) -> Callable[[bytes], None]:
    import atheris
    from torch import _weights_only_unpickler as unpickler

    from deploy.cli import UserError
    from kdlite.training.checkpoint import LAST, PREVIOUS, is_whole, load_checkpoint, read_checkpoint, seal

    unpickler.Unpickler.load = atheris.instrument_func(unpickler.Unpickler.load)

    def run(data: bytes) -> None:
        """Read a file, a sealed file, or the pickle of a sealed torch archive: the first byte selects the case."""
        kind, content = data[:1], data[1:]
        if kind in (b"s", b"z"):
            sealed = bytes(seal(bytearray(archive(content) if kind == b"z" else content)))
            assert is_whole(sealed), "is_whole() refuses the output of seal()"
            (folder / LAST).write_bytes(sealed)
            (folder / PREVIOUS).unlink(missing_ok=True)
            with promised(UserError):
                load_checkpoint(folder)
        else:
            is_whole(content)
            (folder / LAST).write_bytes(content)
            (folder / PREVIOUS).write_bytes(content[1:])
            with promised(UserError):
                found = read_checkpoint(folder)
                assert found, "a checkpoint that exists was not read"
                assert is_whole(found[1]), "a damaged checkpoint was read"

    return run


def run_target(folder: Path) -> Callable[[bytes], None]:
    import train
    from deploy.cli import UserError
    from deploy.flags import settle_flags
    from deploy.run_directory import read_given, read_split

    def run(data: bytes) -> None:
        """Read the bytes as args.json, and settle a resume's flags with them; read them as split.csv."""
        (folder / "args.json").write_bytes(data)
        (folder / "split.csv").write_bytes(data)
        with promised(UserError):
            settle_flags(train.FLAGS, {"resume": True, "output": str(folder)}, read_given(folder))
        with promised(UserError):
            read_split(folder / "split.csv")

    return run


def labels_target(folder: Path) -> Callable[[bytes], None]:
    import numpy as np

    from deploy.cli import UserError
    from kdlite.training.teacher_labels import HEADER, Part, checksum, find_fault, find_invalid, read_header

    header = {"k": 2, "classes": 5}

    def run(data: bytes) -> None:
        """Read the bytes as labels.json, and as a file of rows with a correct checksum."""
        (folder / HEADER).write_bytes(data)
        with promised(UserError):
            read_header(folder)
        file = folder / Part(0, 0, 3).name
        file.write_bytes(data + checksum(data))
        if find_fault(file, header, 3) is None:
            rows = np.load(file)
            assert not find_invalid(rows["target"], rows["logprobs"], rows["indices"], 5)

    return run


def reference_target(folder: Path) -> Callable[[bytes], None]:
    from deploy.cli import UserError
    from deploy.reference import read_reference

    config = {"label_names": ["a", "b"], "input_size": [3, 4, 4], "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
    config |= {"interpolation": "bilinear", "num_classes": 2, "library": "timm", "architecture": "resnet18"}
    student = folder / "student"
    student.mkdir(exist_ok=True)
    (student / "config.json").write_text(json.dumps(config | {"model_args": {}, "small_stem": False}))

    def run(data: bytes) -> None:
        """Read the bytes as reference.npz, or as one array of a valid file; the first byte selects the array."""
        file = io.BytesIO(data)
        names = ("images", "labels", "logits", "train_images", "digest")
        if data[:1] in b"01234":
            with zipfile.ZipFile(file := io.BytesIO(), "w") as whole:
                for i, name in enumerate(names):
                    own = (
                        data[1:] if i == int(data[:1] or b"0") else (CORPUS / "reference" / f"{name}.npy").read_bytes()
                    )
                    whole.writestr(f"{name}.npy", own)
        (folder / "reference.npz").write_bytes(file.getvalue())
        with promised(UserError):
            read_reference(student, None, "none")

    return run


def image_target(folder: Path) -> Callable[[bytes], None]:
    from PIL import Image

    from deploy.config import Metadata
    from deploy.preprocess import UnreadableImage, open_image, prepare

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    configs = [
        Metadata(["a"], [3, 32, width], [0.5] * 3, [0.2] * 3, how, crop)
        for width, crop, how in ((32, 0.875, "bilinear"), (48, 1.0, "bicubic"))
    ]

    def run(data: bytes) -> None:
        for config in configs:
            try:
                array = prepare(open_image(data), config)
            except UnreadableImage as error:  # the parent of ImageTooLarge
                check_line(error)
            else:
                assert array.shape == (*config.input_size[1:], 3), str(array.shape)
                assert array.dtype == "uint8", str(array.dtype)

    return run


def request_target(folder: Path) -> Callable[[bytes], None]:
    import numpy as np

    from deploy.server.protocol import RequestError, parse_infer, unpack, write_infer

    shape, classes, limit = (2, 2, 3), 5, 2**16
    logits = np.linspace(-1, 1, 8 * classes, dtype=np.float32).reshape(8, classes)

    def run(data: bytes) -> None:
        """Parse a request: a line with the encoding before a "|", a line with the length of the JSON, and the body."""
        first, _, rest = data.partition(b"\n")
        length, _, body = rest.partition(b"\n")
        encoding = first.decode("latin-1").partition("|")[0].strip().lower()
        try:
            body = unpack(body, encoding, limit) if encoding else body
            assert len(body) <= limit, f"{len(body)} bytes were unpacked"
            asked = parse_infer(body, length.decode("latin-1") or None, shape, 8)
        except RequestError as error:
            check_refusal(error)
            return
        assert asked.images.shape[1:] == shape, str(asked.images.shape)
        assert 1 <= len(asked.images) <= 8, f"{len(asked.images)} images"
        assert asked.images.dtype == "uint8", str(asked.images.dtype)
        answer, headers = write_infer(asked, logits[: len(asked.images)], "student", list("abcde"))
        split = int(headers.get("Inference-Header-Content-Length", len(answer)))
        output = json.loads(answer[:split])["outputs"][0]
        assert output["shape"][0] == len(asked.images), str(output["shape"])

    return run


def photograph_target(folder: Path) -> Callable[[bytes], None]:
    from PIL import Image

    from deploy.config import Metadata
    from deploy.preprocess import formats
    from deploy.server.images import decode
    from deploy.server.protocol import RequestError

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    config = Metadata(["a"], [3, 32, 32], [0.5] * 3, [0.2] * 3, "bilinear", 0.875)

    def run(data: bytes) -> None:
        """Decode a file, or a form if the first line is its Content-Type."""
        kind, _, body = data.partition(b"\n") if data.startswith(b"multipart/") else (b"", b"", data)
        try:
            array = decode(body, kind.decode("latin-1"), config, formats(), MAX_PIXELS)
        except RequestError as error:
            check_refusal(error)
            return
        if isinstance(array, int):  # the number of pixels of an image that is too large to decode
            return
        assert array.shape == (1, 32, 32, 3), str(array.shape)
        assert array.dtype == "uint8", str(array.dtype)

    return run


TARGETS = {
    "config": config_target,
    "run": run_target,
    "labels": labels_target,
    "reference": reference_target,
    "checkpoint": checkpoint_target,
    "image": image_target,
    "request": request_target,
    "photograph": photograph_target,
}


@contextlib.contextmanager
def promised(kind: type[Exception]):
    try:
        yield
    except kind as error:
        check_line(error)


def check_line(error: Exception) -> None:
    from deploy.cli import printable  # run_command prints errors with it

    text = printable(str(error))
    assert len(text.splitlines()) == 1, f"{type(error).__name__} is not one line: {text[:200]!r}"


def check_refusal(error: Any) -> None:
    check_line(error)
    assert error.status in (400, 413, 415), f"status {error.status}"
    assert len(error.message.encode()) < 1000, "an error message repeats too much of the input"


VALUES = (None, True, False, 0, 1, 3, -1, 0.01, 1e-320, 1e308, 2**70, float("nan"), float("-inf"), "", "a", "bicubic",
          "timm", "file", "\ud800", "weights\n", "\u2028", [], [[]], [3, 8, 8], [3, 1, 16_384], {}, {"a": 1},
          {"a\n": []}, {"": {}})  # fmt: skip


def mutate_config(data: bytes, largest: int, seed: int) -> bytes:
    """Change one value of the JSON in half of the calls, because JSON with random bytes is seldom valid."""
    import atheris

    random = Random(seed)
    try:
        whole = json.loads(data)
        if random.random() < 0.5 or not isinstance(whole, dict):
            raise ValueError
        node = whole
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = random.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or random.random() < 0.3:
                break
            node = node[key]
        if isinstance(node, dict) and random.random() < 0.2:
            node[random.choice(["file", "a\x00", "pretrained_x", "\ud800", "\x85", "b"])] = random.choice(VALUES)
        elif isinstance(key, str) and random.random() < 0.1:
            del node[key]
        else:
            node[key] = random.choice(VALUES)
        text = json.dumps(whole).encode()
        return text if len(text) <= largest else data
    except (ValueError, RecursionError, IndexError):
        return atheris.Mutate(data, largest)


def mutate_request(data: bytes, largest: int, seed: int) -> bytes:
    """Mutate the body of a request as JSON if it is not compressed, otherwise as bytes."""
    import atheris

    plain = b"|\n\n"
    if data.startswith(plain):
        return plain + mutate_config(data.removeprefix(plain), largest - len(plain), seed)
    return atheris.Mutate(data, largest)


def archive(pickle: bytes) -> bytes:
    """Return an archive in the format of torch.save, with these bytes as its pickle and with one storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for name, content in (("data.pkl", pickle), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3")):
            whole.writestr(f"archive/{name}", content)
    return file.getvalue()


# ---- the search ---------------------------------------------------------------------------------------------------


def search(target: str, found: Path, new: Path, seconds: int, seed: int) -> None:
    """Search until libFuzzer ends this process."""
    import atheris
    import torch  # before the instrumentation, which would only make torch slower

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["deploy", "PIL", "python_multipart"]):
        import deploy.config
        import deploy.preprocess
        import deploy.server.images
        import deploy.server.protocol

        deploy.preprocess.formats()  # imports Pillow's readers
    limit = GIB_ADDRESSABLE * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    folder = new.parent / "work"
    folder.mkdir(exist_ok=True)
    run, places = TARGETS[target](folder), set()

    def one_input(data: bytes) -> None:
        try:
            run(data)
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
            where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(error)[:60]
            place = hashlib.sha256(f"{type(error).__name__} {where}".encode()).hexdigest()[:12]
            kept = found / f"{place}.input"
            if place not in places or len(data) < kept.stat().st_size:
                kept.write_bytes(data)
                (found / f"{place}.txt").write_text("".join(traceback.format_exception(error)))
            places.add(place)

    flags = [f"-max_total_time={seconds}", f"-timeout={SECONDS_A_RUN}", f"-max_len={LARGEST[target]}", f"-seed={seed}",
             "-rss_limit_mb=3000", "-print_final_stats=1", f"-artifact_prefix={found}/"]  # fmt: skip
    mutators = {"config": mutate_config, "run": mutate_config, "request": mutate_request}
    mutator = {"custom_mutator": mutators[target]} if target in mutators else {}
    atheris.Setup([sys.argv[0], *flags, str(new), str(CORPUS / SEEDS.get(target, target))], one_input, **mutator)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of the findings (default: a new folder in /tmp)")
    parser.add_argument("--inner", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        sys.path.insert(0, str(ROOT))
        search(args.target, *args.inner, args.seconds, args.seed)
        return 0
    with TemporaryDirectory() as scratch:
        found = args.output or Path(f"/tmp/fuzz-{args.target}-{os.getpid()}")
        found.mkdir(parents=True, exist_ok=True)
        new = Path(scratch) / "new"  # inputs that reached new code; a second start continues from them
        new.mkdir()
        return repeat(args, found, new)


def repeat(args: argparse.Namespace, found: Path, new: Path) -> int:
    """Start the search again each time an input ends it, until the time is over; print a report."""
    began, executions, ends, coverage = time.monotonic(), 0, 0, 0
    while (left := round(args.seconds - (time.monotonic() - began))) > 0:
        command = [sys.executable, __file__, args.target, "--seconds", str(left), "--seed", str(args.seed + ends)]
        run = subprocess.run(
            [*command, "--inner", found, new],
            capture_output=True, text=True, errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        counts = [int(n) for n in re.findall(r"^(?:stat::number_of_executed_units:\s+|#)(\d+)", run.stderr, re.M)]
        executions += max(counts, default=0)
        coverage = max([coverage, *map(int, re.findall(r"cov: (\d+)", run.stderr))])
        if run.returncode == 0:
            break
        ends += 1
        (found / f"end-{ends}.txt").write_text(run.stderr[-20_000:])
        if not counts:
            print(run.stderr, file=sys.stderr)
            return 2
    findings = sorted(path for path in found.iterdir() if path.suffix != ".txt")
    seconds = round(time.monotonic() - began)
    report = {
        "target": args.target,
        "seconds": seconds,
        "executions": executions,
        "coverage": coverage,
        "inputs kept": len(list(new.iterdir())),
        "processes that ended early": ends,
        "findings": [f"{path} ({path.stat().st_size} bytes)" for path in findings],
    }
    print(json.dumps(report, indent=2))
    return 1 if findings or ends else 0


if __name__ == "__main__":
    sys.exit(main())
