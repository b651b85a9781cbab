"""Test the conformance vectors that deploy.pack writes and deploy.selftest compares."""

import json
import zipfile
import zlib

import numpy as np
import pytest
from commands import deploy, refused
from plain_student import metadata_of, write_onnx

from deploy import pack, selftest
from deploy.config import FLOAT
from deploy.preprocess import jpeg_scale, open_image, prepare
from deploy.runtimes import RunOn, load


@pytest.fixture
def student(tmp_path):
    """Return a student/ folder with vectors."""
    folder = tmp_path / "student"
    folder.mkdir()
    write_onnx(folder, metadata_of())
    (folder / "config.json").write_text("{}")
    deploy(pack, folder, "-o", tmp_path / "student.pyz")
    return folder


def test_the_vectors_contain_pictures_their_prepared_bytes_and_their_logits(student):
    folder, runtime = student / "vectors", load(student / "student.onnx", RunOn("cpu"))
    index = json.loads((folder / "index.json").read_text())
    assert len(index["pictures"]) == 10
    assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000
    assert index["label_names"] == runtime.metadata.label_names
    logits = index["logits"]["student.onnx"]
    assert (logits["temperature"], logits["threshold"]) == (runtime.metadata.temperature, runtime.metadata.threshold)
    for picture, row in zip(index["pictures"], logits["values"]):
        content, prepared = ((folder / picture[name]).read_bytes() for name in ("file", "prepared"))
        image = prepare(open_image(content), runtime.metadata)
        assert image.tobytes() == prepared
        assert zlib.crc32(prepared) == picture["crc32"]
        assert np.array_equal(runtime.run(image[None])[0], np.float32(row))
    found = [open_image(folder / picture["file"]) for picture in index["pictures"]]
    assert {"JPEG", "PNG"} == {image.format for image in found}
    assert {"RGB", "L", "P", "RGBA"} <= {image.mode for image in found}
    assert {5, 6} <= {image.getexif().get(0x0112) for image in found}
    shapes = {image.width / image.height for image in found}
    assert min(shapes) < 0.5
    assert max(shapes) > 8


@pytest.mark.slow
def test_no_jpeg_is_large_enough_for_a_reduced_scale(student):
    """Check that every JPEG is too small for decoding at a smaller scale, which only some decoders support."""
    for size in ([3, 64, 64], [3, 16, 16], [3, 300, 20], [1, 700, 700]):
        needed = (size[2], size[1])
        for picture in selftest.PICTURES:
            image = open_image(selftest.draw(picture, min(max(size[1:]), selftest.LARGEST_SIDE)))
            if image.format == "JPEG":
                assert jpeg_scale(image.size, needed) == 1, (size, picture)


@pytest.mark.slow
def test_the_logits_of_other_files_of_the_same_student_are_kept(student, tmp_path):
    other = student / "student-fp16.onnx"
    other.write_bytes((student / "student.onnx").read_bytes())
    deploy(pack, student, "--file", other.name, "-o", tmp_path / "student.pyz")
    assert json.loads((student / "vectors/index.json").read_text())["logits"].keys() == {"student.onnx", other.name}
    write_onnx(student, metadata_of(crop=1.0))  # with another crop
    deploy(pack, student, "-o", tmp_path / "student.pyz")
    assert json.loads((student / "vectors/index.json").read_text())["logits"].keys() == {"student.onnx"}


def test_a_student_with_float_input_passes_the_selftest(tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")
    write_onnx(tmp_path, metadata_of(input=FLOAT))
    deploy(pack, tmp_path, "-o", tmp_path / "student.pyz")
    deploy(selftest, tmp_path)
    assert "passed: 10 pictures" in capfd.readouterr().out


def test_selftest_fails_on_a_wrong_byte_and_on_a_wrong_logit(student, capfd):
    prepared, index = student / "vectors/png-grey.bin", student / "vectors/index.json"
    good = prepared.read_bytes()
    prepared.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    deploy(selftest, student, check=1)
    out = capfd.readouterr().out
    assert "FAIL png-grey.png" in out
    assert "1 of 12288 bytes differ, by up to 1" in out
    prepared.write_bytes(good)
    vectors = json.loads(index.read_text())
    vectors["logits"]["student.onnx"]["values"][3][2] += 0.1
    index.write_text(json.dumps(vectors))
    deploy(selftest, student, check=1)
    out = capfd.readouterr().out
    assert "FAIL jpeg-turned-6.jpg" in out
    assert out.count("FAIL ") == 1
    assert "FAILED: 10 pictures" in out


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: v.clear(), "no vectors of format 1"),
    (lambda v: v.update(format=2), "no vectors of format 1"),
    (lambda v: v["pictures"][0].update(file="../../etc/passwd"), "no vectors of format 1"),
    (lambda v: v["pictures"][0].update(file=7), "no vectors of format 1"),
    (lambda v: v["logits"]["student.onnx"].update(values=[["x"]]), "no vectors of format 1"),
    (lambda v: v.update(logits={}), "no vectors of format 1"),
    (lambda v: v["pictures"][0].update(prepared="png-tiny.png"), "not those of a prepared image"),
    (lambda v: v.update(input_size=[3, 1, 1]), "another student"),
])  # fmt: skip
def test_damaged_vectors_give_one_line(student, capfd, change, message):
    index = student / "vectors/index.json"
    vectors = json.loads(index.read_text())
    change(vectors)
    index.write_text(json.dumps(vectors))
    assert message in refused(capfd, selftest, student)


def test_a_file_is_compared_only_with_vectors_of_its_precision(student, capfd):
    index = student / "vectors/index.json"
    vectors = json.loads(index.read_text())
    vectors["logits"] = {"other.onnx": vectors["logits"]["student.onnx"]}
    index.write_text(json.dumps(vectors))
    deploy(selftest, student)
    assert "passed: 10 pictures, student.onnx compared with other.onnx" in capfd.readouterr().out
    vectors["logits"]["other.onnx"]["precision"] = "int8-cpu"
    index.write_text(json.dumps(vectors))
    assert "the vectors are those of other.onnx, not of student.onnx (fp32)" in refused(capfd, selftest, student)


@pytest.mark.slow
def test_vectors_of_older_weights_are_refused_until_pack_writes_new_ones(student, tmp_path, capfd):
    write_onnx(student, metadata_of(source={"weights_sha256": "1" * 64}))
    deploy(pack, student, "-o", tmp_path / "student.pyz")
    write_onnx(student, metadata_of(source={"weights_sha256": "2" * 64}))
    assert "belongs to other weights than student.onnx: python -m deploy.pack" in refused(capfd, selftest, student)
    deploy(pack, student, "-o", tmp_path / "student.pyz")
    deploy(selftest, student)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"logits": []}'])
def test_pack_replaces_damaged_vectors(student, tmp_path, damage):
    index = student / "vectors/index.json"
    vectors = json.loads(index.read_text())
    index.write_text(json.dumps(vectors | {"logits": []}) if "logits" in damage else damage)
    deploy(pack, student, "-o", tmp_path / "student.pyz")
    assert json.loads(index.read_text()) == vectors


def test_a_student_without_vectors_gives_one_line(tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")
    write_onnx(tmp_path, metadata_of())
    assert "python -m deploy.pack writes the vectors" in refused(capfd, selftest, tmp_path)


def test_pack_takes_the_given_student_if_the_current_folder_has_a_file_of_this_name(student, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_onnx(elsewhere, metadata_of(label_names=["other"] * 10))
    monkeypatch.chdir(elsewhere)
    deploy(pack, student, "-o", "out.pyz")
    with zipfile.ZipFile("out.pyz") as archive:
        assert json.loads(archive.read("student/config.json"))["label_names"] == metadata_of().label_names


def test_a_file_of_the_current_folder_does_not_replace_a_missing_student(student, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (student / "student.onnx").rename("student.onnx")
    assert "no student.onnx in" in refused(capfd, pack, student, "-o", "out.pyz")


def test_a_file_of_older_weights_is_not_packed(student, tmp_path, capfd):
    (student / "model.safetensors").write_bytes(b"the weights after a resume")
    write_onnx(student, metadata_of(source={"weights_sha256": "of the weights before"}))
    assert "was made from other weights than those in" in refused(capfd, pack, student, "-o", tmp_path / "out.pyz")
    assert not (tmp_path / "out.pyz").exists()


def test_a_student_in_a_read_only_folder_can_be_packed(student, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pack.os, "access", lambda path, mode: "vectors" not in str(path))
    deploy(pack, student, "-o", tmp_path / "again.pyz")
    assert "the vectors are only in the packed file" in capfd.readouterr().out
    assert (tmp_path / "again.pyz").is_file()


def test_the_tolerance_depends_on_the_precision():
    names = ("fp32", "fp16", "int8-cpu", "int8-tensorrt", "foreign")
    assert [selftest.tolerance_of(name) for name in names] == [1e-4, 3e-2, 0.1, 0.1, 1e-4]
