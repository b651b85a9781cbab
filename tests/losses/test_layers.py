"""Test on real architectures that default_tap chooses the expected layer."""

import itertools

import pytest
import torch
from nets import images
from torch import nn
from torch.nn import functional as F

from kdlite import FeatureTap, WithWeakHead, default_tap, uskd_loss

ARCHITECTURES = [
    ("torchvision", "resnet18", 64, "layer3.1", 256),
    ("torchvision", "resnet50", 64, "layer3.5", 1024),
    ("torchvision", "mobilenet_v2", 64, "features.17", 320),
    ("timm", "mobilenetv2_100", 64, "blocks.6.0", 320),
    ("timm", "mobilenetv1_100", 64, "blocks.3.5", 512),
    ("torchvision", "shufflenet_v2_x1_0", 64, "stage4.3", 464),
    ("torchvision", "regnet_x_1_6gf", 64, "trunk_output.block3", 408),
    ("torchvision", "swin_t", 64, "features.5.5", 384),
    ("timm", "deit_tiny_patch16_224", 64, "blocks.5", 192),
    ("torchvision", "mobilenet_v3_small", 64, "features.11", 96),
    ("torchvision", "efficientnet_b0", 64, "features.7.0", 320),
    ("torchvision", "densenet121", 64, "features.denseblock3", 1024),
    ("torchvision", "vgg11_bn", 64, "features.20", 512),
    ("torchvision", "convnext_tiny", 64, "features.5.8", 384),
    ("torchvision", "swin_v2_t", 64, "features.5.5", 384),
    ("torchvision", "vit_b_16", 64, "encoder.layers.encoder_layer_5", 768),
    ("torchvision", "maxvit_t", 224, "blocks.2", 256),
    ("torchvision", "mnasnet0_5", 64, "layers.13.0", 160),
    ("torchvision", "squeezenet1_1", 64, "features.11", 512),
    ("torchvision", "alexnet", 64, "features.11", 256),
    ("timm", "resnet18", 64, "layer3.1", 256),
    ("timm", "mobilenetv3_small_100", 64, "blocks.3.1", 48),
    ("timm", "efficientnet_b0", 64, "blocks.6.0", 320),
    ("timm", "convnext_atto", 64, "stages.2", 160),
    ("timm", "swin_tiny_patch4_window7_224", 224, "layers.2", 384),
    ("timm", "deit3_small_patch16_224", 64, "blocks.5", 384),
    ("timm", "maxvit_pico_rw_256", 256, "stages.2", 128),
    ("timm", "edgenext_xx_small", 64, "stages.2", 88),
    ("timm", "regnetx_002", 64, "s3", 152),
    ("timm", "ghostnet_100", 64, "blocks.5.0", 80),
    ("timm", "mixer_s32_224", 64, "blocks.3", 512),
    ("timm", "mobilevit_xxs", 64, "stages.3.1", 64),
    ("timm", "levit_128s", 224, "stages.1", 256),
    ("timm", "pvt_v2_b0", 64, "stages.2", 160),
    ("timm", "poolformer_s12", 64, "stages.2", 320),
    ("timm", "efficientvit_b0", 64, "stages.2", 64),
    ("timm", "repvgg_a0", 64, "stages.2.13", 192),
    ("timm", "fastvit_t8", 64, "stages.2", 192),
    ("timm", "tiny_vit_5m_224", 224, "stages.2", 160),
    ("timm", "vit_small_patch16_dinov3", 64, "blocks.5", 384),
]

ONE_OF_EACH_KIND = {"resnet18", "mobilenet_v2", "swin_t", "deit_tiny_patch16_224", "densenet121"}


def marked(rows):
    return [pytest.param(*row, marks=[] if row[1] in ONE_OF_EACH_KIND else pytest.mark.trial) for row in rows]


def build(library, name, size):
    if library == "timm":
        timm = pytest.importorskip("timm")
        fixed = timm.get_pretrained_cfg(name).fixed_input_size and size < 224
        return timm.create_model(name, num_classes=7, **(dict(img_size=size) if fixed else {}))
    torchvision = pytest.importorskip("torchvision")
    options = dict(image_size=size) if name.startswith("vit") else {}
    return torchvision.models.get_model(name, num_classes=7, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size", "tap", "channels"), marked(ARCHITECTURES))
def test_an_architecture_has_its_default_tap_and_channels(library, name, size, tap, channels):
    with torch.device("cpu" if name.startswith("regnet_") else "meta"):  # RegNet's constructor reads a value
        model = build(library, name, size).to("meta")
    student = WithWeakHead(model, num_classes=7, example_input=torch.zeros(1, 3, size, size, device="meta"))
    assert default_tap(model) == student.tap == tap
    assert student.head.in_features == channels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "size"),
    marked([row[:3] for row in ARCHITECTURES]),
)
def test_uskd_trains_the_weak_head_and_the_layers_before_the_tap(library, name, size):
    torch.manual_seed(0)
    student = WithWeakHead(build(library, name, size), example_input=torch.zeros(1, 3, size, size))
    logits, weak_logits = student(images(2, size))
    loss = uskd_loss(logits, weak_logits, torch.tensor([1, 2]), mu=0.1)
    loss.backward()
    assert loss.isfinite()
    assert student.head.weight.grad.abs().sum() > 0
    # the loss of the weak head alone reaches the layers before the tap
    weak_only = torch.autograd.grad(
        F.cross_entropy(student(images(2, size))[1], torch.tensor([1, 2])),
        [p for p in student.model.parameters() if p.requires_grad],
        allow_unused=True,
    )
    assert any(g is not None and g.abs().sum() > 0 for g in weak_only)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "read"),
    [
        ("deit_tiny_patch16_224", 64, lambda f: f[:, 0]),  # the class token
        ("cait_xxs24_224", 64, lambda f: f.mean(1)),  # CaiT adds its class token after the tap
        ("mixer_s32_224", 64, lambda f: f.mean(1)),
        ("swin_tiny_patch4_window7_224", 224, lambda f: f.mean((1, 2))),
        ("convnext_atto", 64, lambda f: f.mean((2, 3))),
    ],
)
def test_the_head_reads_the_class_token_or_the_mean(name, size, read):
    student = WithWeakHead(build("timm", name, size), example_input=torch.zeros(1, 3, size, size))
    student.model.eval()  # because drop path would make two forwards differ
    _, weak_logits = student(images(2, size))
    with FeatureTap(student.model, student.tap) as tap:
        student.model(images(2, size))
        torch.testing.assert_close(weak_logits, student.head(read(tap.pop())))


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(224, 448), (448, 224)])
def test_swin_is_read_with_its_channels_last(height, width):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.swin_t(num_classes=5)
        student = WithWeakHead(model, example_input=torch.zeros(1, 3, height, width))
    assert student.head.in_features == 384


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenetv3_small_100", "ghostnet_100", "resnet18", "convnext_atto"]
)
def test_activation_checkpointing_runs_the_default_tap_and_keeps_the_gradients(name):
    """Use timm's checkpointing, which calls the blocks of a stage instead of the stage."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    student = WithWeakHead(build("timm", name, 64), example_input=images(2, 32))
    student.model.eval()  # disables dropout and fixes the batch norm statistics
    gradients = []
    for enable in (False, True):
        student.model.set_grad_checkpointing(enable)
        student.zero_grad()
        logits, weak_logits = student(images(2, 32))
        (F.cross_entropy(logits, torch.tensor([1, 2])) + weak_logits.square().sum()).backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain)


class Stages(nn.Module):
    """Contain two candidates for the default layer, ``layer2`` and ``blocks.1``, of which only one runs."""

    def __init__(self, runs):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.fc, self.runs = nn.Linear(3, 5), runs

    def forward(self, x):
        for layer in self.blocks if self.runs == "blocks" else (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("runs", "tap"), [("blocks", "blocks.1"), ("layers", "layer2")])
def test_the_next_candidate_is_used_if_the_default_layer_does_not_run(runs, tap):
    assert WithWeakHead(Stages(runs), example_input=images()).tap == tap


@pytest.mark.slow
def test_if_the_default_layer_returns_no_feature_the_error_lists_other_layers():
    timm = pytest.importorskip("timm")
    model = timm.create_model("hrnet_w18_small", num_classes=5)
    with pytest.raises(
        ValueError, match=r"layer 'stage3' must return a feature .* returns list; these layers do: "
    ) as error:
        WithWeakHead(model, example_input=images(2, 64))
    for layer in str(error.value).rpartition("these layers do: ")[2].split(", "):
        assert WithWeakHead(model, layer, example_input=images(2, 64))(images(2, 64))[1].shape == (2, 5)


def test_a_backbone_inside_a_classifier_is_found():
    torchvision = pytest.importorskip("torchvision")
    backbone = torchvision.models.resnet18()
    assert default_tap(nn.Sequential(backbone, nn.Linear(1000, 5))) == "0.layer3.1"
    assert default_tap(nn.ModuleDict({"model": nn.ModuleDict({"backbone": backbone})})) == "model.backbone.layer3.1"
    unknown = nn.Sequential(nn.Linear(4, 8), nn.ModuleDict({f"layer{i}": nn.Linear(64, 64) for i in (1, 2, 3)}))
    # only a large first child counts as a backbone
    with pytest.raises(ValueError, match="no default tap for Sequential"):
        default_tap(unknown)


def test_the_error_for_an_unknown_structure_asks_for_the_layer():
    with pytest.raises(ValueError, match="no default tap for Sequential: pass tap="):
        WithWeakHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), example_input=images())


def test_a_structure_without_stages_is_refused():
    class MobileNet(nn.Module):  # thirteen layers in one list: their names do not show stages
        def __init__(self):
            super().__init__()
            widths = [32 * 2 ** (i // 3) for i in range(14)]
            self.layers = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))

    with pytest.raises(ValueError, match="no default tap for MobileNet"):
        default_tap(MobileNet())


def test_three_stages_or_blocks_in_a_list_are_enough_for_a_default_tap():
    cifar = nn.ModuleDict({f"layer{i}": nn.Identity() for i in (1, 2, 3)})
    assert default_tap(cifar) == "layer2"
    timm = pytest.importorskip("timm")
    assert default_tap(timm.create_model("convit_tiny")) == "blocks.5"
