"""Test student.html in Chromium, opened from the disk without a network."""

import base64
import contextlib
import functools
import gzip
import io
import json
import re
import shutil

import numpy as np
import pytest
from commands import deploy, refused
from PIL import Image, ImageCms, PngImagePlugin
from plain_student import LABELS, metadata_of, write_onnx
from sklearn.datasets import load_sample_images

from deploy import pack, page
from deploy.cli import UserError
from deploy.config import FLOAT
from deploy.pack import pack as pack_file
from deploy.preprocess import open_image, prepare
from deploy.runtimes import RunOn, load, softmax

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def runtime():
    """Return the archive of ONNX Runtime Web, which npm fetches once."""
    try:
        return page.fetched_runtime()
    except UserError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def opened(browser, file, query="", **options):
    """Open a page from the disk without a network, and wait for its model. Any error of the page fails the test."""
    context = browser.new_context(offline=True, **options)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.goto(f"file://{file}{query}")
    page.wait_for_selector("body[data-ready]", timeout=120_000)
    yield page
    assert problems == []
    context.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory, runtime):
    folder = tmp_path_factory.mktemp("page")
    artefact = write_onnx(folder, metadata_of(metrics={"val_top1": 91.25, "val_top5": 99.5}))
    pack_file(artefact, folder / "student.html", runtime)
    return folder / "student.html"


@pytest.fixture(scope="module")
def student(browser, html):
    """Yield a tab with the page. Several tests share it, because a page takes seconds to open."""
    with opened(browser, html) as page:
        yield page


def upload(page, content, name="photo.jpg"):
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": content})


def shown(page):
    page.wait_for_selector("#answers li:nth-child(5)")
    return [line.inner_text().split("\n") for line in page.query_selector_all("#answers li")]


def expected_answer(artefact, content, **changes):
    student = load(artefact, RunOn("cpu"))
    logits = student.run(prepare(open_image(content), student.metadata)[None])[0] / changes.get("temperature", 1)
    best = np.argsort(-logits, kind="stable")[:5]
    return [[LABELS[i].strip().replace("\u2028", "").strip(), f"{100 * softmax(logits)[i]:.1f} %"] for i in best]


def as_shown(rows):
    return [[label.replace("\u2028", "").strip(), percent] for label, percent in rows]


# ---- pictures ------------------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@functools.cache
def photo(i=0):
    return Image.fromarray(load_sample_images().images[i])


def crop(width, height, i=0):
    return photo(i).crop((40, 30, 40 + width, 30 + height))


def pictures():
    """Yield the names and bytes of pictures. The JPEGs are so small that no decoder decodes them at a smaller scale."""
    sizes = [(200, 150), (150, 201), (97, 64), (64, 64), (240, 61), (33, 180), (17, 9), (1, 1), (250, 250)]
    for width, height in sizes:
        for sampling in ("4:2:0", "4:2:2", "4:4:4"):
            yield f"{width}x{height} {sampling}", encoded(crop(width, height), "JPEG", subsampling=sampling, quality=88)
        yield f"{width}x{height} png", encoded(crop(width, height, 1))
        yield f"{width}x{height} grey jpeg", encoded(crop(width, height).convert("L"), "JPEG")
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP"):
            yield f"{kind} turned {orientation}", encoded(crop(120, 77), kind, exif=exif_of(orientation))
    base, noise = crop(131, 90), np.random.default_rng(0)
    alpha = Image.fromarray(noise.integers(0, 256, (90, 131)).astype(np.uint8))
    rgba = base.copy()
    rgba.putalpha(alpha)
    palette = base.quantize(40)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (100000).to_bytes(4, "big"))
    yield "progressive", encoded(base, "JPEG", progressive=True)
    yield "quality 5", encoded(base, "JPEG", quality=5)
    yield "profile in a jpeg", encoded(base, "JPEG", icc_profile=profile)
    yield "profile in a png", encoded(base, icc_profile=profile)
    yield "gamma in a png", encoded(base, pnginfo=gamma)
    yield "damaged exif", encoded(base, "JPEG", exif=b"Exif\0\0no exif at all")
    yield "bytes after a jpeg", encoded(base, "JPEG") + b"trailer" * 9
    for mode in ("1", "L", "LA", "P"):
        yield f"png {mode}", encoded((rgba if mode == "LA" else base).convert(mode))
    for bits in (1, 2, 4):
        yield f"png of {bits} bits", encoded(base.quantize(2**bits), bits=bits)
    yield "alpha", encoded(rgba)
    yield "alpha of 0 and 255", encoded(Image.merge("RGBA", (*base.split(), alpha.point(lambda a: 255 * (a > 99)))))
    yield "opaque alpha", encoded(base.convert("RGBA"))
    yield "transparent palette", encoded(palette, transparency=bytes(range(0, 200, 5)))
    yield "transparent grey", encoded(base.convert("L"), transparency=100)
    yield "transparent colour", encoded(palette.convert("RGB"), transparency=palette.convert("RGB").getpixel((3, 3)))
    yield "webp", encoded(base, "WEBP", quality=80)
    yield "lossless webp", encoded(base, "WEBP", lossless=True)
    yield "webp with alpha", encoded(rgba, "WEBP", lossless=True, exact=True)
    yield "lossy webp with alpha", encoded(rgba, "WEBP", quality=70)
    yield "gif", encoded(palette, "GIF")
    yield "transparent gif", encoded(palette, "GIF", transparency=5)
    for kind in ("GIF", "WEBP", "PNG"):
        yield f"moving {kind}", encoded(base, kind, save_all=True, append_images=[crop(131, 90, 1)], duration=100)
    yield "a long strip", encoded(Image.fromarray(noise.integers(0, 256, (20, 3000, 3)).astype(np.uint8)))
    yield "a high strip", encoded(Image.fromarray(noise.integers(0, 256, (3000, 11, 3)).astype(np.uint8)))
    yield "noise", encoded(Image.fromarray(noise.integers(0, 256, (201, 173, 3)).astype(np.uint8)))
    yield "large png", encoded(photo().resize((2600, 1800)))


PREPARE = """async files => {
  const results = []
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), c => c.charCodeAt(0))
    try {
      const image = await askWorker("prepare", new Blob([bytes]))
      results.push(btoa(Array.from(image, x => String.fromCharCode(x)).join("")))
    } catch (reason) { results.push("error: " + reason.message) }
  }
  return results
}"""


def prepared_by(page, files):
    found = page.evaluate(PREPARE, [base64.b64encode(file).decode() for file in files])
    return [text if text.startswith("error: ") else np.frombuffer(base64.b64decode(text), np.uint8) for text in found]


@pytest.mark.trial
@pytest.mark.parametrize(("size", "interpolation", "share"), [
    ([3, 64, 64], "bicubic", 0.875), ([3, 48, 81], "bilinear", 0.9), ([1, 32, 32], "bilinear", 1.0),
])  # fmt: skip
def test_the_page_prepares_a_hundred_pictures_as_python_does(browser, runtime, tmp_path, size, interpolation, share):
    metadata = metadata_of(input_size=size, interpolation=interpolation, crop=share)
    pack_file(write_onnx(tmp_path, metadata), tmp_path / "student.html", runtime)
    names, files = zip(*pictures())
    assert len(files) >= 100
    with opened(browser, tmp_path / "student.html") as page:
        found = prepared_by(page, files)
    different = {}
    for name, file, image in zip(names, files, found):
        expected = prepare(open_image(file), metadata).ravel()
        if isinstance(image, str):
            different[name] = image
        elif not np.array_equal(image, expected):
            different[name] = (np.count_nonzero(image != expected), np.abs(image.astype(int) - expected).max())
    assert different == {}


def damaged(name):
    """Return an unreadable file and a part of the page's error; if the name is empty, return all names."""
    image, png = crop(120, 90), encoded(crop(120, 90))
    files = {
        "empty": (b"", "empty"),
        "text": (b"no picture at all", "not a picture of a known format"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a picture of a known format"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC"),
        "bmp": (encoded(image, "BMP"), "not a picture of a known format"),
        "16 bits": (encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16))), "16 bits"),
        "cmyk": (encoded(image.convert("CMYK"), "JPEG"), "CMYK"),
        "half a jpeg": (encoded(image, "JPEG")[:-300], "cut off"),
        "half a progressive jpeg": (encoded(image, "JPEG", progressive=True)[:-300], "cut off"),
        "half a png": (png[:-300], "cut off"),
        "half a webp": (encoded(image, "WEBP")[:-30], "cut off"),
        "the first bytes": (encoded(image, "JPEG")[:20], "cut off"),
        "a wrong byte in a png": (png[:500] + bytes([png[500] ^ 1]) + png[501:], "damaged"),
        "half a gif": (encoded(image, "GIF")[:400], "damaged"),
    }
    return files[name] if name else list(files)


def test_a_picture_that_cannot_be_read_gets_an_error_with_the_reason(student):
    page = student
    found = prepared_by(page, [damaged(name)[0] for name in damaged("")])
    wrong = {name: text for name, text in zip(damaged(""), found) if damaged(name)[1] not in text}
    assert wrong == {}
    upload(page, damaged("text")[0])
    page.wait_for_selector("#error:not(:empty)")
    assert "JPEG, PNG, WebP and GIF" in page.inner_text("#error")
    assert page.inner_text("#busy") == ""


def test_a_picture_can_be_chosen_dropped_or_pasted_and_the_page_describes_the_model(student, html):
    content = encoded(photo(), "JPEG")
    page = student
    assert page.title() == "tiny_net"
    about = page.inner_text("#about")
    assert about == "tiny_net · fp32 · top-1 91.2 %, top-5 99.5 % of its validation images"
    expected = as_shown(expected_answer(html.with_name("student.onnx"), content))
    upload(page, content)
    assert as_shown(shown(page)) == expected
    for kind, name in (("DragEvent", "drop"), ("ClipboardEvent", "paste")):
        page.evaluate("document.getElementById('answers').replaceChildren()")
        page.evaluate(
            """([kind, name, text]) => {
                const data = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
                data.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }))
                const given = { bubbles: true, dataTransfer: data, clipboardData: data }
                document.getElementById("drop").dispatchEvent(new self[kind](name, given))
            }""",
            [kind, name, base64.b64encode(content).decode()],
        )
        assert as_shown(shown(page)) == expected
    page.evaluate("""document.getElementById('drop').dispatchEvent(
        new DragEvent('drop', { bubbles: true, dataTransfer: new DataTransfer() }))""")
    assert "not a file" in page.inner_text("#error")


def test_hostile_labels_are_text(student):
    """Check that a label neither ends the script nor becomes an element."""
    page = student
    page.click("summary")
    page.fill("#filter", "SCRIPT")
    assert page.inner_text("#names") == LABELS[1]
    page.fill("#filter", "")
    assert page.locator("#names li").count() == len(LABELS)
    assert page.locator("#names b").count() == 0
    assert page.evaluate("about.label_names") == LABELS
    assert page.title() == "tiny_net"


def test_the_page_cannot_send_anything(browser, html):
    """Check that the page's security policy blocks a request even with a network."""
    tab = browser.new_page()
    tab.goto(f"file://{html}")
    blocked = """() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.violatedDirective))
        fetch("https://example.org/").catch(() => {}) })"""
    assert tab.evaluate(blocked) == "connect-src"
    tab.close()
    text = html.read_text(encoding="utf-8")
    assert "connect-src 'none'" in text
    assert "Copyright (c) Microsoft Corporation" in text
    assert not re.search(r'(src|href)="(?!data:)', text[: text.index("<script")])


def test_the_camera_takes_a_picture(student):
    """Use Chromium's fake camera, which must be off afterwards."""
    page = student
    page.click("#camera")
    page.wait_for_selector("#view", state="visible")
    page.wait_for_function("() => document.getElementById('camera').textContent === 'Take the picture'")
    assert page.is_visible("#close")
    page.click("#camera")
    page.wait_for_selector("#image[alt='camera.png']")
    assert len(shown(page)) == 5
    assert not page.is_visible("#view")
    assert page.evaluate("view.srcObject") is None
    page.evaluate("""() => { navigator.mediaDevices.getUserMedia = async () => {
        throw new DOMException("", "NotFoundError") } }""")
    page.click("#camera")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "No camera was found."


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.trial)])
def test_the_page_fits_a_phone_and_works_with_a_keyboard_and_a_screen_reader(browser, html, scheme):
    with opened(browser, html, viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        upload(page, encoded(photo()), "a" * 200 + ".png")
        assert len(shown(page)) == 5
        reached = []
        for _ in range(4):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert reached == ["file", "camera", "SUMMARY", "selftest"]
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('verdict').textContent.includes('Passed')")
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        visible = "button, #drop, summary"
        sizes = [box["height"] for one in page.query_selector_all(visible) if (box := one.bounding_box())]
        assert min(sizes) >= 44  # pixels that a finger needs
        names = page.evaluate("""() =>
            Array.from(document.querySelectorAll("input:not([aria-hidden]), button, progress, video"))
            .filter(one => !(one.labels?.[0]?.textContent || one.ariaLabel || one.textContent).trim())
            .map(one => one.id)""")
        assert names == []
        assert page.locator("#answers progress").first.get_attribute("aria-label") == shown(page)[0][0].strip()


def test_the_page_uses_the_threshold_the_temperature_and_the_input_type_of_the_file(browser, runtime, tmp_path):
    metadata = metadata_of(input=FLOAT, temperature=2.5, threshold=0.9, mean=[0.4, 0.5, 0.6], crop=1.0)
    artefact = write_onnx(tmp_path, metadata)
    pack_file(artefact, tmp_path / "student.html", runtime)
    content = encoded(photo(1), "JPEG")
    with opened(browser, tmp_path / "student.html", "?selftest") as page:
        upload(page, content)
        assert as_shown(shown(page)) == as_shown(expected_answer(artefact, content, temperature=2.5))
        assert "None of these" in page.inner_text("#none")
        page.wait_for_function("() => document.getElementById('verdict').textContent.includes('Passed')")
        page.evaluate("worker.terminate()")


def test_wrong_bytes_fail_the_self_test(browser, runtime, html, tmp_path):
    """Change the interpolation of the page, so that its prepared images differ from those of the self-test."""
    settings = re.compile(r'(<script type="application/json" id="settings">)(.*?)(</script>)', re.S)
    text = html.read_text(encoding="utf-8")
    values = json.loads(settings.search(text)[2])
    values["interpolation"] = "bilinear"
    (tmp_path / "wrong.html").write_text(
        settings.sub(lambda found: found[1] + page.as_script(values) + found[3], text), encoding="utf-8"
    )
    with opened(browser, tmp_path / "wrong.html", "?selftest") as wrong:
        wrong.wait_for_function("() => document.getElementById('verdict').textContent.includes('FAILED')")
        assert "jpeg-420-16x9.jpg" in wrong.inner_text("#verdict")


@pytest.mark.parametrize("part", ["model", pytest.param("wasm", marks=pytest.mark.trial)])
def test_a_page_with_a_damaged_model_shows_an_error_for_each_picture(browser, html, tmp_path, part):
    """Damage the model, or the runtime that opens it."""
    start = f'(<script type="text/plain" id="{part}">).*?(</script>)'
    junk = base64.b64encode(gzip.compress(b"damaged")).decode()
    text = re.sub(start, lambda found: found[1] + junk + found[2], html.read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "damaged.html").write_text(text, encoding="utf-8")
    tab = browser.new_page()
    tab.goto(f"file://{tmp_path}/damaged.html")
    tab.wait_for_selector("#error:not(:empty)")
    assert tab.inner_text("#error").startswith("This page cannot open its model: ")
    assert not tab.is_visible("#loading")
    upload(tab, encoded(crop(99, 99)))
    tab.wait_for_selector("#image", state="visible")
    tab.wait_for_function("() => busy.textContent === ''")
    assert tab.inner_text("#error").startswith("This page cannot open its model: ")
    tab.close()


LOGITS = """async images => {
  const results = []
  for (const image of images) results.push(Array.from(await askWorker("logitsOf", Uint8Array.from(image))))
  return results
}"""


@pytest.mark.parametrize(("name", "tolerance"), [
    ("student.onnx", 1e-5), ("student-fp16.onnx", 1e-5), ("student-int8-cpu.onnx", 0.02),
])  # fmt: skip
def test_the_logits_of_each_precision_are_those_of_onnxruntime(browser, runtime, deployed, tmp_path, name, tolerance):
    shutil.copytree(deployed, tmp_path / "run")
    deploy(pack, tmp_path / "run", "--file", name, "-o", tmp_path / "student.html", "--runtime", runtime)
    student = load(tmp_path / "run/student" / name, RunOn("cpu"))
    images = np.load(tmp_path / "run/reference.npz")["images"][:20]
    with opened(browser, tmp_path / "student.html") as page:
        found = np.array(page.evaluate(LOGITS, images.reshape(len(images), -1).tolist()))
    expected = student.run_in_parts(images, 1)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# ---- deploy.pack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    (["--runtime", "other.tgz"], "is not the file of npm pack onnxruntime-web@"),
    (["--runtime", "nothing.tgz"], "nothing.tgz cannot be read"),
    ([], "npm, which fetches ONNX Runtime Web, is not installed: on another machine run npm pack onnxruntime-web@"),
    (["-o", "student.pyz", "--runtime", "other.tgz"], "--runtime is for student.html"),
    (["-o", "student/student.onnx"], "expected a name that ends with .pyz or .html"),
    (["-o", "student/config.json"], "expected a name that ends with .pyz or .html"),
])  # fmt: skip
def test_a_mistake_with_pack_gives_one_line(capfd, tmp_path, monkeypatch, flags, message):
    student = tmp_path / "student"
    student.mkdir()
    write_onnx(student, metadata_of())
    (student / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    (tmp_path / "student.html").write_text("the former one")
    assert message in refused(capfd, pack, student, *([] if "-o" in flags else ["-o", "student.html"]), *flags)
    assert (tmp_path / "student.html").read_text() == "the former one"
    assert not (tmp_path / "student.pyz").exists()


def test_a_failure_of_npm_and_a_wrong_file_from_npm_give_one_line(capfd, tmp_path, monkeypatch):
    student, npm = tmp_path / "student", tmp_path / "bin/npm"
    student.mkdir()
    write_onnx(student, metadata_of())
    (student / "config.json").write_text("{}")
    npm.parent.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    file = f"{page.PACKAGE}-{page.VERSION}.tgz"
    for script, message in (
        ("echo offline >&2; exit 1", "(offline): on another machine run npm pack"),
        (f"echo x > {file}", "(the SHA-512 of its file differs): on another machine run npm pack"),
        ("exit 0", "(no file): on another machine run npm pack"),
    ):
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755)
        assert message in refused(capfd, pack, student, "-o", tmp_path / "student.html")
    assert not (tmp_path / "student.html").exists()
    assert list((tmp_path / "cache/kdlite").iterdir()) == []
