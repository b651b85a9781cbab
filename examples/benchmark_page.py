"""Measure student.html in Chromium: python examples/benchmark_page.py STUDENT.onnx

The script packs the file, and opens the page from the disk without a network. It measures the seconds to open the page,
and the seconds from a JPEG of 12 megapixels to the answer. It measures the milliseconds of an image in the page and in
ONNX Runtime on one thread, in turns. It needs Chromium and the package playwright.
"""

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.cli import UserError, command, make_parser, need, number
from deploy.pack import pack
from deploy.runtimes import RunOn, load

RUN = """async image => {
  const started = performance.now()
  await askWorker("logitsOf", Uint8Array.from(image))
  return performance.now() - started
}"""
PHOTOGRAPH = 4000, 3000  # pixels


def run(args: argparse.Namespace) -> None:
    sync_api = need("playwright.sync_api", "pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        raise UserError("Chromium is not installed: apt-get install chromium")
    native = load(args.artefact, RunOn("cpu", threads=1))
    image = np.random.default_rng(0).integers(0, 256, native.image_shape, np.uint8)
    photograph = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize(PHOTOGRAPH).save(photograph, "JPEG", quality=90)
    upload = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph.getvalue()}
    opening, in_page, in_native, answering = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as playwright:
        html = Path(folder) / "student.html"
        pack(args.artefact, html)
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(args.rounds):
            page = chromium.new_context(offline=True).new_page()
            started = time.perf_counter()
            page.goto(f"file://{html}")
            page.wait_for_selector("body[data-ready]", timeout=120_000)
            opening.append(time.perf_counter() - started)
            for _ in range(12):
                in_page.append(page.evaluate(RUN, image.ravel().tolist()))
                started = time.perf_counter()
                native.run(image[None])
                in_native.append(1e3 * (time.perf_counter() - started))
            started = time.perf_counter()
            page.set_input_files("#file", upload)
            page.wait_for_selector("#answers li")
            answering.append(time.perf_counter() - started)
            page.close()
        print(f"{args.artefact.name}: {html.stat().st_size / 1e6:.1f} MB, Chromium {chromium.version}, "
              f"{args.rounds} rounds")  # fmt: skip
        chromium.close()
    here, there = statistics.median(in_page), statistics.median(in_native)
    print(f"open: {statistics.median(opening):.1f} s (median)")
    print(f"an image: {here:.1f} ms, {here / there:.1f} times ONNX Runtime's {there:.1f} ms (medians)")
    print(f"a JPEG of 12 megapixels, {len(photograph.getvalue()) / 1e6:.1f} MB: {min(answering):.2f} to "
          f"{max(answering):.2f} s from file to answer")  # fmt: skip


parser = make_parser(__doc__, "benchmark_page.py")
parser.add_argument("artefact", type=Path, help="an .onnx file of deploy.export or deploy.quantize")
parser.add_argument("--rounds", type=number(int, 1), default=3, help="times that the page is opened (default: 3)")

if __name__ == "__main__":
    sys.exit(command(parser, run))
