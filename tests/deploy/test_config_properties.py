"""Test the reader of config.json with odd values and with values that hypothesis draws."""

import copy
import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from PIL import Image

from deploy.cli import UserError
from deploy.config import check_arguments, read_config
from deploy.preprocess import prepare

settings.register_profile(
    "config",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("config")


def attempt(call, *errors):
    """Return (result, None) of a call, or (None, error)."""
    try:
        return call(), None
    except errors as error:
        return None, error


# ---- config.json --------------------------------------------------------------------------------------------------


VALID = {
    "label_names": ["cat", "dog"],
    "num_classes": 2,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "input_size": [3, 8, 12],
    "interpolation": "bilinear",
    "crop": 0.875,
    "library": "timm",
    "architecture": "resnet18",
    "model_args": {"width": [1, 2]},
    "small_stem": False,
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [0, 1, 3, 8, 2**40, 1e-320, 0.01, 1.0, "bicubic", "timm", "file", [3, 8, 8], [3, 1, 40], [3, 5, 1]]
    ),
)
NAMES = st.one_of(st.text(max_size=8), st.sampled_from(sorted(VALID)))
JSON = st.recursive(
    SCALARS,
    lambda parts: st.one_of(st.lists(parts, max_size=4), st.dictionaries(NAMES, parts, max_size=4)),
    max_leaves=8,
)
LARGEST = 256  # pixels; a larger side is valid, but slow to test


@st.composite
def mutations(draw):
    """Draw a valid config, and change or remove up to three of its values."""
    config = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = config
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        if isinstance(place, dict) and draw(st.integers(0, 9)) == 0:
            del place[key]
            if not config:
                break
        elif isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
            place[draw(NAMES)] = draw(JSON)
        else:
            place[key] = draw(JSON)
        if not all(map(bool, (config, place))):
            break
    return config


def is_one_line(error):
    text = str(error)
    return bool(text) and text.splitlines() == [text]


def check_config(folder, text):
    (folder / "config.json").write_bytes(text)
    config, refusal = attempt(lambda: read_config(folder), UserError)
    if refusal:
        assert is_one_line(refusal), repr(refusal)
        return False
    assert all(map(math.isfinite, config.mean + config.std))
    assert min(config.std) > 0
    channels, height, width = config.input_size
    if max(height, width) / config.crop <= LARGEST:
        assert prepare(Image.new("RGB", (20, 10)), config).shape == (height, width, channels)
    return True


def test_the_config_without_a_mutation_is_valid(tmp_path):
    assert check_config(tmp_path, json.dumps(VALID).encode())


def places(node, path=()):
    yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


ODD = [
    None,
    True,
    False,
    0,
    1,
    2,
    8,
    9,
    -1,
    0.01,
    0.5,
    1.0,
    1e-320,
    1e308,
    2**70,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "a",
    "bicubic",
    "file",
    "\ud800",
    "a\nb",
    [],
    [[]],
    [3, 8, 8],
    [3, 5, 1],
    [1, 8, 8],
    {},
    {"a": 1},
    {"a": [[]]},
    {"weights": 1},
]


@pytest.mark.parametrize("path", list(places(VALID)), ids=lambda path: "-".join(map(str, path)) or "whole")
def test_a_config_with_one_odd_value_can_be_used_or_is_refused_in_one_line(tmp_path, path):
    for value in ODD:
        config = {"": copy.deepcopy(VALID)}
        *parents, last = "", *path
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
        check_config(tmp_path, json.dumps(config[""]).encode())


@given(mutations())
@settings(max_examples=100)
def test_a_mutated_config_can_be_used_or_is_refused_in_one_line(tmp_path, config):
    check_config(tmp_path, json.dumps(config).encode())


@given(JSON)
@example([])
@example({})
def test_any_json_is_refused_in_one_line_or_can_be_used(tmp_path, value):
    check_config(tmp_path, json.dumps(value).encode())


@given(st.binary(max_size=64))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\xff\xfe{\x00}\x00")
@example(b"1" * 5000)
def test_any_bytes_are_refused_in_one_line(tmp_path, content):
    assert not check_config(tmp_path, content)


def test_argument_names_with_line_breaks_are_refused_in_one_line():
    for name in ("a\nb", "a\rb", "a\x85b", "a\u2028b"):
        with pytest.raises(UserError) as caught:
            check_arguments({name: 1}, "config.json")
        assert is_one_line(caught.value), name


@given(st.dictionaries(st.one_of(NAMES, st.text(max_size=3).map("weights".__add__)), JSON, max_size=3))
def test_any_arguments_are_plain_values_or_refused_in_one_line(arguments):
    _, refusal = attempt(lambda: check_arguments(arguments, "config.json"), UserError)
    if refusal:
        assert is_one_line(refusal), repr(refusal)
        return
    values = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
    assert all(v is None or isinstance(v, (bool, int, float, str)) for v in values)
    assert all(name.isidentifier() and not name.startswith("weights") for name in arguments)
