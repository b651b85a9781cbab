"""Test the memory and the copies of deploy.tensorrt with a fake libcudart, without a GPU or an engine."""

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deploy import tensorrt
from deploy.config import FLOAT, UINT8, Metadata

LABELS = ["a", "b", "c", "d", "e"]
SHAPE = (4, 6, 3)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler is installed")
    file = tmp_path_factory.mktemp("cuda") / "libcudart.so"
    source = Path(__file__).parents[1].joinpath("fake_cudart.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", file, source], check=True)
    fake = ctypes.CDLL(str(file))
    fake.fake_log.restype = ctypes.c_char_p
    fake.fake_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p]
    return fake


class Context:
    """Imitate TensorRT's execution context, which launches work in the stream of the fake library."""

    def __init__(self, library):
        self.library, self.addresses, self.shape = library, {}, None

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        assert name == "images"
        self.shape = shape
        return shape[0] <= 8

    def execute_async_v3(self, stream):
        rows, pixels = self.shape[0], int(np.prod(self.shape[1:]))
        addresses = self.addresses["images"], self.addresses["logits"]
        return self.library.fake_launch(*addresses, rows, pixels, len(LABELS), stream) == 0


class FakeEngine:
    def __init__(self, library):
        self.create_execution_context = lambda: Context(library)


def make(library, integrated=False, fails="", max_batch=8, layout=UINT8):
    library.fake_reset(int(integrated), ctypes.c_char_p(fails.encode()))
    metadata = Metadata(LABELS, [3, 4, 6], [0.0] * 3, [1.0] * 3, "bilinear", 1.0, input=layout)
    return tensorrt.Engine(FakeEngine(library), tensorrt.Cuda(library), metadata, max_batch)


def calls(library):
    """Return the names of the calls since the last reset, without cudaDeviceGetAttribute."""
    names = [line.split()[0] for line in library.fake_log().decode().splitlines()]
    return [name for name in names if name != "cudaDeviceGetAttribute"]


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def logits(batch):
    return batch.reshape(len(batch), -1).sum(1, dtype=np.float32)[:, None] * np.arange(1, 6, dtype=np.float32)


@pytest.mark.parametrize("integrated", [False, True])
def test_an_engine_returns_the_logits_of_batches_of_any_allowed_size(library, integrated):
    engine = make(library, integrated)
    for count in (1, 8, 3, 5):
        batch = images(count, seed=count)
        np.testing.assert_array_equal(engine.run(batch), logits(batch))


def test_the_next_batch_does_not_change_earlier_logits(library):
    engine = make(library)
    first = engine.run(images(2, 0))
    engine.run(images(2, 1))
    np.testing.assert_array_equal(first, logits(images(2, 0)))


def test_a_run_copies_the_images_then_launches_then_copies_the_logits_and_waits(library):
    engine = make(library)
    library.fake_reset(0, b"")
    engine.run(images(3))
    log = library.fake_log().decode().splitlines()
    assert log == [
        f"cudaMemcpyAsync {3 * 72} 1", "launch 3", f"cudaMemcpyAsync {3 * 5 * 4} 2", "cudaStreamSynchronize",
    ]  # fmt: skip


def test_an_integrated_gpu_copies_nothing(library):
    engine = make(library, integrated=True)
    assert calls(library) == ["cudaStreamCreate", *["cudaHostAlloc", "cudaHostGetDevicePointer"] * 2]
    assert f"cudaHostAlloc {8 * 72} 2" in library.fake_log().decode()  # the flag 2 maps the memory
    library.fake_reset(1, b"")
    engine.run(images(3))
    assert calls(library) == ["launch", "cudaStreamSynchronize"]


def test_float_input_is_normalised_nchw(library):
    engine = make(library, layout=FLOAT)
    assert engine.images.array.shape == (8, 3, 4, 6)
    assert engine.images.array.dtype == np.float32
    engine.run(images(2))
    np.testing.assert_allclose(engine.images.array[:2], images(2).transpose(0, 3, 1, 2) / 255.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("by", ["close", "garbage"])
def test_memory_is_freed_in_the_reverse_order(library, integrated, by):
    gc.collect()
    before = library.fake_open()
    engine = make(library, integrated)
    taken = [name for name in calls(library) if name != "cudaHostGetDevicePointer"]
    engine.run(images(1))
    library.fake_reset(int(integrated), b"")
    if by == "close":
        engine.close()
        engine.close()  # a second call does nothing
        with pytest.raises(RuntimeError, match="closed"):
            engine.run(images(1))
    else:
        del engine
        gc.collect()
    opposite = {"cudaMalloc": "cudaFree", "cudaHostAlloc": "cudaFreeHost", "cudaStreamCreate": "cudaStreamDestroy"}
    assert calls(library) == ["cudaStreamSynchronize", *(opposite[name] for name in reversed(taken))]
    assert library.fake_open() == before


@pytest.mark.parametrize("fails", ["cudaStreamCreate", "cudaHostAlloc", "cudaMalloc", "cudaDeviceGetAttribute"])
def test_memory_taken_before_a_failure_is_freed(library, fails):
    gc.collect()
    before = library.fake_open()
    with pytest.raises(RuntimeError, match=rf"{fails}: out of memory \(CUDA error 2\)"):
        make(library, fails=fails)
    assert library.fake_open() == before


@pytest.mark.parametrize("fails", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failed_call_is_an_error_that_names_it(library, fails):
    engine = make(library)
    library.fake_reset(0, ctypes.c_char_p(fails.encode()))
    with pytest.raises(RuntimeError, match=f"{fails}: "):
        engine.run(images(1))
    library.fake_reset(0, b"")
    engine.close()


def test_a_batch_that_is_too_large_or_empty_is_refused(library):
    engine = make(library)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"a batch of {count}, but the engine takes 1 to 8"):
            engine.run(images(count))


def test_a_missing_libcudart_is_an_error_that_names_it(monkeypatch):
    def nothing(name):
        raise OSError(name)

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", nothing)
    with pytest.raises(tensorrt.UserError, match="libcudart"):
        tensorrt.load_cuda()
