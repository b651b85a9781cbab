"""Make the page that shows a student: deploy.serve returns it at /, and deploy.pack writes it as student.html.

student.html holds the model and ONNX Runtime Web, unpacks them in a worker, and needs neither a server nor a network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from deploy import cli
from deploy.cli import UserError, log, read_file, replacing, write_whole
from deploy.config import Metadata
from deploy.runtimes import tensor_names

# The npm package, and the SHA-512 of its archive, as the registry prints it: npm view onnxruntime-web dist.integrity
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
DIGEST = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = {"ort": "package/dist/ort.wasm.bundle.min.mjs", "wasm": "package/dist/ort-wasm-simd-threaded.wasm"}
FETCH_S = 600  # time limit of npm for 33 MB
PLACE = "<!-- parts of student.html -->\n"
NOTICE = f"""<!-- This file holds ONNX Runtime Web {VERSION} (npm package {PACKAGE}), under the MIT License:

Copyright (c) Microsoft Corporation. All rights reserved.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE. -->
"""


def read_page() -> str:
    return importlib.resources.files("deploy").joinpath("page.html").read_text(encoding="utf-8")


def describe_model(metadata: Metadata, file: str) -> dict[str, Any]:
    """Return the name, the labels and a summary of a model, for the page. file: the name of the artefact."""
    name = metadata.architecture.rpartition(":")[2] or file.partition(".")[0]
    line = [name, metadata.precision or "fp32"]
    scores = {"top-1": metadata.metrics.get("val_top1"), "top-5": metadata.metrics.get("val_top5")}
    known = [f"{label} {score:.1f} %" for label, score in scores.items() if isinstance(score, (int, float))]
    if known:
        converted = "" if metadata.precision in ("", "fp32") else f", before the conversion to {metadata.precision}"
        line.append(f"{', '.join(known)} of its validation images{converted}")
    return {"name": name, "label_names": metadata.label_names, "summary": " · ".join(line)}


def write_html(artefact: Path, metadata: Metadata, vectors: dict[str, Any], runtime: Path | None, output: Path) -> None:
    """Write student.html around an ONNX file.

    vectors: from deploy.selftest.as_one_object; runtime: the archive of the npm package; None: npm fetches it once
    """
    library = runtime_parts(runtime)
    names = ("input_size", "crop", "interpolation", "mean", "std", "input", "temperature", "threshold")
    settings = describe_model(metadata, artefact.name) | {name: getattr(metadata, name) for name in names}
    settings["tensors"] = tensor_names(metadata)
    worker = importlib.resources.files("deploy").joinpath("worker.js").read_text(encoding="utf-8")
    parts = [NOTICE, script("settings", as_script(settings), "application/json"), script("worker", worker)]
    packed = {**library, "model": read_file(artefact), "vectors": json.dumps(vectors).encode()}
    parts += [script(name, base64.b64encode(gzip.compress(data, mtime=0)).decode()) for name, data in packed.items()]
    page = read_page().replace("connect-src 'self'", "connect-src 'none'")
    write_whole(output, page.replace(PLACE, "".join(parts)))


def as_script(values: Any) -> str:
    """Return JSON that cannot end the script element around it, because labels may come from other people."""
    return json.dumps(values).replace("<", "\\u003c")


def script(name: str, text: str, kind: str = "text/plain") -> str:
    return f'<script type="{kind}" id="{name}">{text}</script>\n'


# ---- ONNX Runtime Web ----------------------------------------------------------------------------------------------


def runtime_parts(archive: Path | None) -> dict[str, bytes]:
    """Return the files of RUNTIME by name; raise UserError if the given archive does not have the pinned SHA-512."""
    content = read_file(archive or fetched_runtime())
    if archive and not is_pinned(content):
        raise UserError(f"{archive} is not the file of npm pack {PACKAGE}@{VERSION}: its SHA-512 differs")
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        return {name: files.extractfile(path).read() for name, path in RUNTIME.items()}  # type: ignore[union-attr]


def is_pinned(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == DIGEST


def fetched_runtime() -> Path:
    """Return the path of the npm archive in the user's cache folder; if it is missing, npm fetches it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlite"
    archive, npm = cache / f"{PACKAGE}-{VERSION}.tgz", shutil.which("npm")
    if archive.is_file() and is_pinned(read_file(archive)):
        return archive
    instead = f"on another machine run npm pack {PACKAGE}@{VERSION}, then give --runtime {archive.name} here"
    if npm is None:
        raise UserError(f"npm, which fetches ONNX Runtime Web, is not installed: {instead}")
    log(f"npm fetches {PACKAGE} {VERSION} into {cache}, once")
    with replacing(archive) as partial:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(partial.parent)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, cwd=partial.parent)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"npm did not fetch ONNX Runtime Web ({cli.first_line(error)}): {instead}") from error
        reason = " ".join(done.stderr.split())[:200]
        if not done.returncode and partial.is_file():
            reason = "" if is_pinned(read_file(partial)) else "the SHA-512 of its file differs"
        if done.returncode or reason or not partial.is_file():
            raise UserError(f"npm did not fetch ONNX Runtime Web ({reason or 'no file'}): {instead}")
    return archive
