"""Test the page of deploy.serve in Chromium."""

import contextlib
import json

import pytest
from PIL import Image
from serving import NAMES, ask, in_thread, picture
from sklearn.datasets import load_sample_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(artefact):
    with in_thread(artefact) as port:
        yield port


@pytest.mark.parametrize("how", ["drop", pytest.param("choose", marks=pytest.mark.trial)])
def test_the_page_shows_the_five_best_labels_of_an_image(browser, port, tmp_path, how):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(load_sample_images().images[0]).save(photo)
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    if how == "choose":
        page.set_input_files("#file", photo)
    else:
        dropped = page.evaluate_handle(
            """bytes => { const data = new DataTransfer()
                data.items.add(new File([new Uint8Array(bytes)], "photo.jpg", {type: "image/jpeg"})); return data }""",
            list(photo.read_bytes()),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#answers li:nth-child(5)")
    shown = [line.inner_text().split("\n") for line in page.query_selector_all("#answers li")]
    predictions = json.loads(ask(port, "/predict", photo.read_bytes())[2])["predictions"]
    assert shown == [[p["label"], f"{100 * p['probability']:.1f} %"] for p in predictions]
    assert page.is_visible("#image")
    page.set_input_files("#file", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    page.wait_for_selector("#error:not(:empty)")
    assert "not an image" in page.inner_text("#error")
    assert "curl" not in page.inner_text("#error")
    assert problems == []
    page.close()


def upload(page, name):
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": picture()})


def predictions(label):
    return json.dumps({"predictions": [{"label": label, "probability": 0.5, "index": 0}]})


@pytest.mark.trial
def test_the_later_of_two_quick_pictures_is_shown_and_the_page_is_busy_until_then(browser, port):
    page = browser.new_page()
    held = []
    page.route("**/predict*", lambda route: held.append(route))  # a slow server that answers the first picture last
    page.goto(f"http://127.0.0.1:{port}/")
    upload(page, "first.png")
    page.wait_for_function("() => document.getElementById('busy').textContent !== ''")
    upload(page, "second.png")
    while len(held) < 2:
        page.wait_for_timeout(20)
    held[1].fulfill(body=predictions("the second"), content_type="application/json")
    page.wait_for_selector("#answers li")
    with contextlib.suppress(Exception):  # the page has cancelled this request
        held[0].fulfill(body=predictions("the first"), content_type="application/json")
    page.wait_for_timeout(200)
    assert page.inner_text("#answers").startswith("the second")
    assert page.locator("#answers li").count() == 1
    assert page.get_attribute("#image", "alt") == "second.png"
    assert page.inner_text("#busy") == ""
    page.close()


@pytest.mark.trial
@pytest.mark.parametrize(("status", "body", "reason"), [
    (502, "<html><title>502 Bad Gateway</title><h1>nginx</h1></html>", "answered 502"),
    (200, "<!doctype html><title>Log in to the network</title>", "Log in to the network"),
    (503, '{"error": "the queue is full"}', "the queue is full"),
])  # fmt: skip
def test_an_error_is_shown_with_its_reason(browser, port, status, body, reason):
    page = browser.new_page()
    page.route("**/predict*", lambda route: route.fulfill(status=status, body=body))
    page.goto(f"http://127.0.0.1:{port}/")
    upload(page, "a.png")
    page.wait_for_selector("#error:not(:empty)")
    assert reason in page.inner_text("#error")
    assert "JSON" not in page.inner_text("#error")
    assert page.inner_text("#busy") == ""
    page.close()


@pytest.mark.trial
def test_a_server_that_cannot_be_reached_is_an_error(browser, port):
    page = browser.new_page()
    page.route("**/predict*", lambda route: route.abort())
    page.goto(f"http://127.0.0.1:{port}/")
    upload(page, "a.png")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "The server cannot be reached."
    page.close()


@pytest.mark.trial
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_with_long_labels(browser, port, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page.route("**/predict*", lambda route: route.fulfill(body=predictions("an_endless_label_" * 20)))
    page.goto(f"http://127.0.0.1:{port}/")
    upload(page, "a" * 200 + ".png")
    page.wait_for_selector("#answers li")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#drop").bounding_box()["height"] >= 44  # pixels that a finger needs
    page.close()


def test_the_page_asks_for_a_token_and_reports_a_wrong_one(browser, artefact):
    with in_thread(artefact, token="s3cret") as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#token", state="visible")
        assert page.inner_text("#error") == ""
        assert not page.is_visible("#classes")  # the labels need the token, too
        upload(page, "a.png")
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "The server does not accept this token."
        page.fill("#token", "s3cret")
        page.press("#token", "Enter")
        page.wait_for_selector("#answers li:nth-child(5)")
        assert not page.is_visible("#token")
        assert page.is_visible("#classes")
        assert page.inner_text("#error") == ""
        page.close()


def test_the_page_shows_its_model_and_finds_a_camera(browser, port):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("body[data-ready]")
    assert page.inner_text("#about") == "tiny · fp32"
    page.click("summary")
    assert page.locator("#names li").all_inner_texts() == NAMES
    assert page.locator("#names b").count() == 0  # a label is not HTML
    assert not page.is_visible("#selftest")
    page.click("#camera")
    page.wait_for_function("() => document.getElementById('camera').textContent === 'Take the picture'")
    page.click("#camera")
    page.wait_for_selector("#answers li:nth-child(5)")
    page.close()


@pytest.mark.trial
def test_a_page_without_a_camera_opens_the_file_chooser(browser, port):
    """Test a browser that blocks the camera, as it does over http:// from another machine."""
    page = browser.new_page()
    page.add_init_script("Object.defineProperty(Navigator.prototype, 'mediaDevices', { value: undefined })")
    page.goto(f"http://127.0.0.1:{port}/")
    with page.expect_file_chooser() as chosen:
        page.click("#camera")
    chosen.value.set_files({"name": "x.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#answers li:nth-child(5)")
    page.close()


@pytest.mark.trial
def test_an_uncertain_answer_is_shown_as_none_of_these(browser, port):
    page = browser.new_page()
    answer = json.dumps(json.loads(predictions("a cat")) | {"none_of_these": True})
    page.route("**/predict*", lambda route: route.fulfill(body=answer, content_type="application/json"))
    page.goto(f"http://127.0.0.1:{port}/")
    upload(page, "a.png")
    page.wait_for_selector("#none:not(:empty)")
    assert "None of these" in page.inner_text("#none")
    page.close()
