"""Foreign networks as students: which layer is replaced, what is left alone, clear errors."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip
from torch import Tensor, nn
from torchvision.models import convnext_tiny, segmentation

from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import adapt_segmenter


def convolution(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def features(outputs: int = 8) -> nn.Sequential:
    return nn.Sequential(
        convolution(3, 6, stride=2), nn.BatchNorm2d(6), nn.ReLU(), convolution(6, outputs, stride=2)
    )


class Upsampling(nn.Module):
    """A segmenter that enlarges its own scores, and has an auxiliary classifier."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.encoder = features(7)
        self.classifier = nn.Conv2d(7, 5, 1, bias=False)
        self.auxiliary = nn.Conv2d(7, 5, 1)
        self.mode = mode

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        encoded = self.encoder(images)
        scores = F.interpolate(self.classifier(encoded), images.shape[2:], mode=self.mode)
        return {"aux": self.auxiliary(encoded), "out": scores}


class Returning(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> object:
        return self.value


def assert_trains(model: nn.Module, size: int = 64) -> None:
    model.train()
    model(torch.rand(2, 3, size, size)).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert all(id(p) in {id(q) for q in trained.values()} for p in model.head.parameters())


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param("deeplabv3_resnet50", ["classifier.4"], marks=pytest.mark.slow),
        ("fcn_resnet50", ["classifier.4"]),
        ("lraspp_mobilenet_v3_large", ["classifier.low_classifier", "classifier.high_classifier"]),
    ],
)
def test_torchvision_segmenters(name: str, heads: list[str]) -> None:
    torch.manual_seed(0)
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    module = getattr(segmentation, name)(weights=None, weights_backbone=None, **options)
    reference = copy.deepcopy(module).eval()
    model = adapt_segmenter(module, channels=10).eval()
    assert list(model.head_names) == heads
    assert [layer.out_channels for layer in model.head] == [10] * len(heads)
    assert (model.stride, model.channels) == (8, 10)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("aux" in key for key, _ in model.named_parameters())

    images = torch.rand(1, 3, 72, 64)
    for path in heads:  # the same last layers give the same scores before the upsampling
        old = reference.get_submodule(path)
        with torch.no_grad():
            model.network.get_submodule(path).weight.copy_(old.weight[:10])
            model.network.get_submodule(path).bias.copy_(old.bias[:10])
    with torch.no_grad():
        small = model(images)
        expected = reference((images - model.mean) / model.std)["out"][:, :10]
    assert small.shape == (1, 10, 9, 8)
    enlarged = F.interpolate(small, (72, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged, expected, rtol=1e-4, atol=1e-5)
    assert_trains(model)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_the_caller_names_the_head(name: str) -> None:
    module = getattr(segmentation, name)(weights=None, weights_backbone=None)
    old = module.classifier[4]
    model = adapt_segmenter(module, channels=10, head="classifier.4")
    assert model.head_names == ("classifier.4",) and model.projection is None
    (head,) = model.head
    assert head is module.classifier[4] is not old and head.out_channels == 10
    assert (head.kernel_size, head.in_channels) == (old.kernel_size, old.in_channels)
    assert model.eval()(torch.rand(1, 3, 64, 48)).shape == (1, 10, 8, 6)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("classifer.4", r"groups=1\) or Linear layer .* got 'classifer\.4', no such layer; "
         r"candidates: classifier\.4"),
        ("classifier.1", r"got 'classifier\.1', a BatchNorm2d; candidates: classifier\.4"),
        ("aux_classifier.4", "got 'aux_classifier.4', no such layer; candidates: classifier.4"),
        ("", "got '', a _TorchvisionSegmenter; candidates: classifier.4"),
        ("classifier.0", r"got 'classifier\.0': with 10 outputs of that layer the network fails; "
         r"candidates: classifier\.4"),
    ],
)  # fmt: skip
def test_a_wrong_head_leaves_the_network_as_it_was(head: str, message: str) -> None:
    module = segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    layers = dict(module.named_modules())
    with pytest.raises(ValueError, match=message):
        adapt_segmenter(module, channels=10, head=head)
    assert dict(module.named_modules()) == layers


def test_lraspp_adds_two_layers_and_one_of_them_is_not_the_head() -> None:
    module = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    message = r"got 'classifier\.low_classifier': .* candidates: classifier\.high_classifier"
    with pytest.raises(ValueError, match=message):
        adapt_segmenter(module, channels=10, head="classifier.low_classifier")
    assert module.classifier.low_classifier.out_channels == 21
    assert adapt_segmenter(module, channels=10).head[0].out_channels == 10


def test_a_layer_without_influence_on_the_shape_is_not_the_head() -> None:
    module = Upsampling("bilinear")
    message = (
        r"'auxiliary': with 9 outputs of that layer the network returns shape \(1, 5, 64, 64\)"
    )
    with pytest.raises(ValueError, match=message):
        adapt_segmenter(module, channels=9, head="auxiliary")
    assert adapt_segmenter(module, channels=9, head="classifier").head_names == ("classifier",)


def test_a_linear_head_can_be_named() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.score = features(8), nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.score(self.encoder(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = adapt_segmenter(Tokens(), channels=12, head="score")
    assert isinstance(model.head[0], nn.Linear)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 12, 8, 8)
    assert_trains(model)


def learn(model: CLIPTeacher, rate: float, steps: int = 4) -> list[float]:
    """Total losses of a few steps on one batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    labels = torch.randint(2, (2, 64, 64), generator=generator)
    labels[:, :24] = 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    totals: list[float] = []
    for _ in range(steps):
        total = model(images, labels)["total"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


@pytest.mark.parametrize(
    ("make", "stride", "rate"),
    [
        pytest.param(segmentation.deeplabv3_resnet50, 8, 1e-4, marks=pytest.mark.slow),
        pytest.param(segmentation.fcn_resnet50, 8, 1e-4, marks=pytest.mark.slow),
        (segmentation.lraspp_mobilenet_v3_large, 8, 1e-4),
        pytest.param(lambda **_: convnext_tiny().features, 32, 1e-4, marks=pytest.mark.slow),
        (lambda **_: Upsampling("bilinear"), 1, 3e-3),
        (lambda **_: features(), 4, 3e-3),
    ],
    ids=["deeplabv3", "fcn", "lraspp", "convnext", "dictionary", "plain"],
)
def test_foreign_networks_learn_in_the_framework(
    make: Callable[..., nn.Module], stride: int, rate: float
) -> None:
    torch.manual_seed(0)
    student = adapt_segmenter(make(weights=None, weights_backbone=None), channels=16)
    assert student.stride == stride
    assert student.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    config = CLIPTeacherConfig(scales=(1, 2), kmeans_iterations=2)
    model = CLIPTeacher(tiny_clip(), student, ("cat", "grass"), config).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    totals = learn(model, rate)
    assert totals[-1] < totals[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_the_backbone_of_a_convnext_gets_a_projection() -> None:
    network = convnext_tiny().features
    model = adapt_segmenter(network, channels=16).eval()
    assert model.head_names == () and model.network is network
    assert model.projection.weight.shape == (16, 768, 1, 1)
    images = torch.rand(1, 3, 70, 64)
    with torch.no_grad():
        expected = model.projection(network((images - model.mean) / model.std))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert expected.shape == (1, 16, 2, 2)


@pytest.mark.slow
def test_an_adapted_network_compiles_and_exports() -> None:
    torch.manual_seed(0)
    module = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    model = adapt_segmenter(module, channels=16).eval()
    images = torch.rand(3, 3, 64, 48)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(images)
        # float32 eps is 1e-7, and a decomposed layer may round elsewhere
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)


def test_a_final_convolution_is_replaced_with_its_geometry() -> None:
    module = nn.Sequential(features(), nn.Conv2d(8, 5, 3, 2, 2, dilation=2, bias=False))
    model = adapt_segmenter(module, channels=16)
    (head,) = model.head
    assert (head.kernel_size, head.stride, head.padding) == ((3, 3), (2, 2), (2, 2))
    assert (head.dilation, head.bias, head.out_channels) == ((2, 2), None, 16)
    assert module[1] is head  # in place
    assert model(torch.rand(1, 3, 64, 48)).shape == (1, 16, 8, 6)
    assert model.stride == 8
    assert_trains(model)


@pytest.mark.parametrize(
    "tail",
    [
        nn.ReLU(inplace=True),
        nn.Softmax(dim=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    ],
)
def test_a_feature_map_gets_a_projection(tail: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(features(), tail)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = adapt_segmenter(module, channels=16)
    assert model.head_names == ()
    (head,) = model.head
    assert head is model.projection and head.kernel_size == (1, 1)
    images = torch.rand(2, 3, 32, 32)
    model.eval()
    expected = head(module((images - model.mean) / model.std))
    torch.testing.assert_close(model(images), expected)
    assert model.stride == 4
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert_trains(model)


def test_a_residual_convolution_is_not_the_head() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = convolution(3, 8), convolution(8, 8)

        def forward(self, images: Tensor) -> Tensor:
            stem: Tensor = self.stem(images)
            return stem + self.body(stem)

    assert adapt_segmenter(Residual(), channels=4).head_names == ()


def test_a_convolution_that_runs_twice_is_not_the_head() -> None:
    shared = convolution(3, 3)
    model = adapt_segmenter(nn.Sequential(shared, nn.ReLU(), shared), channels=4)
    assert model.head_names == () and model(torch.rand(1, 3, 16, 16)).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_a_network_that_upsamples_itself(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapt_segmenter(Upsampling(mode), channels=12)
    assert model.head_names == ("classifier",)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 12, 32, 32)
    assert model.stride == 1
    assert "resizes its output from (16, 16) to (64, 64)" in caplog.text
    assert "do not depend on them: network.auxiliary.weight, network.auxiliary.bias" in caplog.text
    assert not model.network.auxiliary.weight.requires_grad
    assert_trains(model)


def test_hugging_face_outputs_are_read() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8
    )
    model = adapt_segmenter(transformers.SegformerForSemanticSegmentation(config), channels=9)
    assert model.head_names == ("decode_head.classifier",)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 9, 16, 16)
    assert model.stride == 4


def test_statistics_and_modes_are_left_alone() -> None:
    module = features()
    module[1].eval()
    module[1].running_mean.fill_(0.5)
    state = torch.get_rng_state()
    model = adapt_segmenter(module, channels=4, normalize="none")
    assert module.training and module[0].training and not module[1].training
    assert (module[1].running_mean == 0.5).all() and module[1].num_batches_tracked == 0
    assert (model.mean == 0).all() and (model.std == 1).all()
    assert not torch.equal(torch.get_rng_state(), state)  # the new layer is random


def test_frozen_layers_stay_frozen_and_the_type_is_kept() -> None:
    module = features().double()
    module[0].requires_grad_(False)
    model = adapt_segmenter(module, channels=4)
    assert not module[0].weight.requires_grad
    assert model(torch.rand(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_state_dict_and_deepcopy() -> None:
    torch.manual_seed(0)
    model = adapt_segmenter(features(), channels=4).eval()
    assert not any(key.startswith(("head", "mean", "std")) for key in model.state_dict())
    images = torch.rand(1, 3, 16, 16)
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(images), model(images), rtol=0, atol=0)
    assert clone.head[0] is not model.head[0]


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (
            Returning(torch.zeros(1, 1000)),
            ValueError,
            r"must return a map .* got shape \(1, 1000\)",
        ),
        (Returning({"scores": 1}), TypeError, r"map at one of .* got \['scores'\]"),
        (Returning([torch.zeros(1, 2, 3, 3)]), TypeError, "must return a tensor .* got list"),
        (nn.Conv2d(4, 8, 1), RuntimeError, r"must accept images of shape \(1, 3, 64, 64\)"),
        (nn.Conv2d(3, 8, 65), RuntimeError, "pass an `image_size` that it accepts"),
    ],
)
def test_networks_that_cannot_be_adapted(
    module: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adapt_segmenter(module, channels=4)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`channels` must be the width"):
        adapt_segmenter(features(), channels=0)
    with pytest.raises(ValueError, match="`normalize` must be 'imagenet' or 'none', got 'clip'"):
        adapt_segmenter(features(), channels=4, normalize="clip")  # type: ignore[arg-type]


def test_image_size_is_the_one_of_the_dry_run() -> None:
    model = adapt_segmenter(nn.Conv2d(3, 8, 65), channels=4, image_size=96)
    assert model(torch.rand(1, 3, 80, 70)).shape == (1, 4, 16, 6)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (9, 2)])
def test_an_image_smaller_than_a_feature_is_padded_with_mean_colour(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = adapt_segmenter(nn.Conv2d(3, 8, 4, stride=4), channels=5)
    H, W = size
    images = model.mean.expand(1, 3, max(H, 4), max(W, 4)).clone()
    images[:, :, :H, :W] = torch.rand(1, 3, H, W)
    features = model(images[:, :, :H, :W])
    assert features.shape == (1, 5, max(1, H // 4), max(1, W // 4))
    torch.testing.assert_close(features, model(images))
