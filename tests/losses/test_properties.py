"""What holds whatever the losses and the config reader are given; hypothesis draws it."""

import copy
import json
import math

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from PIL import Image
from torch.nn import functional as F

from deploy.cli import UserError
from deploy.config import check_arguments, read_config
from deploy.preprocess import prepare
from kdlite import nkd_loss, uskd_loss

BOTH = pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
settings.register_profile(
    "properties",
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("properties")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IGNORED = -100


# ---- what is drawn ------------------------------------------------------------------------------------------------


@st.composite
def cases(draw, dtypes=DTYPES, largest=1e4, ranks=(1, 2, 3)):
    """Two logits tensors of one shape, class indices, and which of them are not ignored."""
    rank, n, c, d = draw(st.sampled_from(ranks)), *(draw(st.integers(low, 5)) for low in (1, 2, 1))
    shape = {1: (c,), 2: (n, c), 3: (n, c, d)}[rank]
    label_shape = {1: (), 2: (n,), 3: (n, d)}[rank]
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, largest]))
    size, count = math.prod(shape), math.prod(label_shape)
    # whole numbers of 1/64: ties are frequent, and a shift by a power of two is exact
    values = st.lists(st.integers(-64, 64), min_size=size, max_size=size)
    a, b = (scale / 64 * torch.tensor(draw(values), dtype=torch.float64).reshape(shape) for _ in range(2))
    target = draw(st.lists(st.integers(0, c - 1), min_size=count, max_size=count))
    valid = torch.tensor([draw(st.sampled_from([True, True, i % 2 == 0, i > 0, False])) for i in range(count)])
    target, valid = torch.tensor(target).reshape(label_shape), valid.reshape(label_shape)
    return a.to(dtype), b.to(dtype), target.where(valid, IGNORED), valid


def gradients(loss, a, b, target, **options):
    """The loss and its gradients: one for NKD, whose teacher has none, two for USKD."""
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    value = loss(a, b, target, **options)
    grads = torch.autograd.grad(value.sum(), (a, b), allow_unused=True)
    return value.detach(), [grad for grad in grads if grad is not None]


def attempt(call, *refusals):
    """What a call returns, None; or None and the error with which it refuses."""
    try:
        return call(), None
    except refusals as error:
        return None, error


def one_hot(target, valid, c):
    return F.one_hot(target.where(valid, 0), c).movedim(-1, min(1, target.ndim)).double()


# ---- losses -------------------------------------------------------------------------------------------------------


@BOTH
@given(cases(), st.sampled_from(["none", "sum"]))
def test_a_loss_and_its_gradients_are_finite(loss, case, reduction):
    a, b, target, valid = case
    value, grads = gradients(loss, a, b, target, reduction=reduction)
    assert value.isfinite().all()
    assert value.dtype == torch.promote_types(a.dtype, torch.float32)
    assert all(grad.isfinite().all() and grad.dtype == a.dtype for grad in grads)
    for grad in grads:
        rows = grad.movedim(min(1, grad.ndim - 1), -1).reshape(-1, a.shape[min(1, a.ndim - 1)])
        assert not rows[~valid.reshape(-1)].any(), "an ignored target has a gradient"


HALF_IGNORED = (torch.eye(2, 3), torch.ones(2, 3), torch.tensor([1, IGNORED]), torch.tensor([True, False]))


@BOTH
@given(cases(), st.booleans())
@example(HALF_IGNORED, False)
def test_reductions_are_the_sum_and_the_mean_of_the_rows(loss, case, soft):
    a, b, target, valid = case
    c = a.shape[min(1, a.ndim - 1)]
    target = one_hot(target, valid, c) if soft else target
    rows, total, mean = (loss(a, b, target, reduction=how).double() for how in ("none", "sum", "mean"))
    count = valid.numel() if soft else int(valid.sum())
    assert rows.shape == valid.shape
    torch.testing.assert_close(total, rows.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, total / count, rtol=1e-5, atol=1e-5, equal_nan=True)
    if not soft:
        assert not rows[~valid].any()


@BOTH
@given(cases(dtypes=[torch.float32, torch.float64], largest=100), st.integers(-10, 10))
def test_a_shift_common_to_all_classes_changes_nothing(loss, case, shift):
    a, b, target, _ = case
    value, grads = gradients(loss, a, b, target, reduction="none")
    moved, moved_grads = gradients(loss, a + shift, b - 2 * shift, target, reduction="none")
    # in float32 a + shift is rounded to 2^-17
    tolerance = dict(rtol=1e-4, atol=1e-4) if a.dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved, value, **tolerance)
    for one, other in zip(moved_grads, grads):
        torch.testing.assert_close(one, other, **tolerance)


@BOTH
@given(cases(dtypes=[torch.float64], largest=200))
def test_a_one_hot_target_is_its_class_index(loss, case):
    a, b, target, _ = case
    target = target.clamp(min=0)
    soft = one_hot(target, target >= 0, a.shape[min(1, a.ndim - 1)])
    value, grads = gradients(loss, a, b, target, reduction="none")
    same, same_grads = gradients(loss, a, b, soft, reduction="none")
    torch.testing.assert_close(same, value, rtol=1e-9, atol=1e-9)
    for one, other in zip(same_grads, grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(cases(dtypes=[torch.float64], ranks=(2,)), st.sampled_from([0.0, 1.5]), st.sampled_from([0.5, 1.0, 3.0]))
def test_nkd_is_the_formula(case, gamma, temperature):
    a, b, target, valid = case
    rows, (grad,) = gradients(nkd_loss, a, b, target, gamma=gamma, temperature=temperature, reduction="none")
    for i in range(len(a)):
        expected = oracle.nkd_row(a[i].tolist(), b[i].tolist(), target[i], gamma, temperature) if valid[i] else 0
        assert rows[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        if valid[i]:
            expected = oracle.nkd_row_gradient(a[i].tolist(), b[i].tolist(), target[i], gamma, temperature)
            assert grad[i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(cases(dtypes=[torch.float64], largest=30, ranks=(2,)), st.sampled_from([0.0, 0.1, 1.0]))
def test_uskd_is_the_formula_over_the_targets_that_count(case, smoothing):
    a, b, target, valid = case
    # R ties to the last bit where logits do: the order of those is not the formula's to say
    a = a + 0.01 * torch.arange(a.shape[1]) + 0.003 * torch.arange(len(a)).unsqueeze(1)
    options = dict(alpha=0.9, beta=0.3, mu=0.2, label_smoothing=smoothing)
    rows = uskd_loss(a, b, target, **options, reduction="none")
    targets = one_hot(target, valid, a.shape[1])[valid].tolist()
    if not targets:
        assert not rows.any()
        return
    expected = oracle.uskd_rows(a[valid].tolist(), b[valid].tolist(), targets, *options.values())
    assert rows[valid].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---- targets ------------------------------------------------------------------------------------------------------


EVERY_DTYPE = [*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64]
SHAPES = st.lists(st.integers(0, 3), max_size=4)
ARRAYS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, st.sampled_from(EVERY_DTYPE))
OBJECTS = st.one_of(
    ARRAYS,
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=3),
    st.builds(dict),
    st.builds(lambda array: array.tolist(), ARRAYS),
    st.builds(lambda array: array.numpy() if array.dtype != torch.bfloat16 else array, ARRAYS),
)


@BOTH
@given(st.sampled_from([(3,), (2, 3), (2, 3, 2), (0, 3), (2, 1)]), OBJECTS, st.sampled_from(["none", "mean", "sum"]))
def test_any_target_is_computed_or_refused(loss, shape, target, reduction):
    logits = torch.zeros(shape)
    value, refusal = attempt(lambda: loss(logits, logits, target, reduction=reduction), TypeError, ValueError)
    assert str(refusal) if refusal else value.dtype == torch.float32


@BOTH
@given(OBJECTS, OBJECTS, OBJECTS)
def test_any_logits_are_computed_or_refused(loss, a, b, target):
    value, refusal = attempt(lambda: loss(a, b, target), TypeError, ValueError)
    assert str(refusal) if refusal else value.isfinite() | value.isnan()  # NaN: the mean of no target


@BOTH
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_a_class_index_out_of_range_is_refused_as_cross_entropy_refuses_it(loss, target):
    target, logits = torch.tensor(target), torch.zeros(len(target), 3)
    try:
        expected = F.cross_entropy(logits, target, reduction="sum").shape
    except (IndexError, RuntimeError):
        with pytest.raises((IndexError, RuntimeError)):
            loss(logits, logits, target, reduction="sum")
    else:
        assert loss(logits, logits, target, reduction="sum").shape == expected


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
LARGEST = 256  # pixels of a side: what is larger is right, and only slow


@st.composite
def mutations(draw):
    """A valid config in which up to three places hold something else, or nothing."""
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


def test_the_config_that_is_mutated_is_a_valid_one(tmp_path):
    assert check_config(tmp_path, json.dumps(VALID).encode())


def places(node, path=()):
    yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


ODD = [None, True, False, 0, 1, 2, 8, 9, -1, 0.01, 0.5, 1.0, 1e-320, 1e308, 2**70, math.nan, math.inf, -math.inf, "",
       "a", "bicubic", "file", "\ud800", "a\nb", [], [[]], [3, 8, 8], [3, 5, 1], [1, 8, 8], {}, {"a": 1}, {"a": [[]]},
       {"weights": 1}]  # fmt: skip


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


def test_arguments_whose_names_break_the_line_are_refused_in_one_line():
    for name in ("a\nb", "a\rb", "a\x85b", "a\u2028b"):
        with pytest.raises(UserError) as caught:
            check_arguments({name: 1}, "config.json")
        assert is_one_line(caught.value), name


@given(st.dictionaries(st.one_of(NAMES, st.text(max_size=3).map("weights".__add__)), JSON, max_size=3))
def test_any_arguments_are_plain_or_refused_in_one_line(arguments):
    _, refusal = attempt(lambda: check_arguments(arguments, "config.json"), UserError)
    if refusal:
        assert is_one_line(refusal), repr(refusal)
        return
    values = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
    assert all(v is None or isinstance(v, (bool, int, float, str)) for v in values)
    assert all(name.isidentifier() and not name.startswith("weights") for name in arguments)
