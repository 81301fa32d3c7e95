"""Activation and heads, which weights do not hold: from the files beside them, or from the caller.

Two packages build a CLIP with GELU and a vision transformer whose heads are 80 channels wide, as
LAION's ViT-H/14 has; they save it as they do, and the loaded model must compute the same features.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from clip_files import save_own, small_clip, to_hugging_face, write_safetensors
from test_clip_model import MEAN, STD, perturb
from torch import Tensor

from cliptteacher.clip import CLIP, CLIPConfig, load_clip, save_clip
from cliptteacher.clip.settings import Settings, read_settings

WIDTH, TEXT_WIDTH, PATCH, SIZE, CONTEXT, VOCABULARY, JOINT = 320, 128, 16, 48, 10, 60, 24


class Saved(NamedTuple):
    """A folder as another package writes it, and the unit features it computes."""

    folder: Path
    image: Tensor
    text: Tensor


def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def texts() -> Tensor:
    ids = torch.randint(1, 50, (3, CONTEXT), generator=torch.Generator().manual_seed(6))
    ids[:, 0], ids[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return ids


@torch.no_grad()
def save_transformers(folder: Path, **options: Any) -> Saved:
    transformers = pytest.importorskip("transformers")
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": JOINT}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": SIZE}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**shared, **vision, "patch_size": PATCH, "num_attention_heads": 4},
            text_config={
                **(shared | text),
                "max_position_embeddings": CONTEXT,
                "vocab_size": VOCABULARY,
                "num_attention_heads": 4,  # of 32 channels
            },
            projection_dim=JOINT,
        )
    ).eval()
    perturb(model)
    model.save_pretrained(folder, **options)
    image = model.visual_projection(model.vision_model((images() - MEAN) / STD).pooler_output)
    text_features = model.text_projection(model.text_model(texts()).pooler_output)
    return Saved(folder, F.normalize(image, dim=1), F.normalize(text_features, dim=1))


OPEN_CLIP = {
    "embed_dim": JOINT,
    "quick_gelu": False,
    "vision_cfg": {
        "layers": 2, "width": WIDTH, "head_width": 80, "patch_size": PATCH, "image_size": SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 4,
        "layers": 2,
    },
}  # fmt: skip


@torch.no_grad()
def save_open_clip(folder: Path) -> Saved:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**OPEN_CLIP).eval()
    perturb(model)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    describe(folder, {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": MEAN.flatten().tolist()}})
    image = model.encode_image((images() - MEAN) / STD, normalize=True)
    return Saved(folder, image, model.encode_text(texts(), normalize=True))


def describe(folder: Path, content: object, name: str = "open_clip_config.json") -> None:
    (folder / name).write_text(json.dumps(content))


@torch.no_grad()
def distance(clip: CLIP, saved: Saved) -> float:
    """The largest difference of a number of a unit feature."""
    image = F.normalize(clip.encode_image(images()).cls, dim=1)
    text = F.normalize(clip.encode_text(texts()), dim=1)
    return max(float((image - saved.image).abs().max()), float((text - saved.text).abs().max()))


def load_quietly(source: Path, **settings: Any) -> CLIP:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_clip(source, **settings)


SAVERS = {"transformers": save_transformers, "open_clip": save_open_clip}


@pytest.fixture(scope="module", params=SAVERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return SAVERS[request.param](tmp_path_factory.mktemp(request.param))


# --- parity -------------------------------------------------------------------------------------


def test_features_equal_those_of_the_package_that_saved_them(saved: Saved) -> None:
    for source in (saved.folder, next(saved.folder.glob("*model.*"))):
        clip = load_quietly(source)
        assert (clip.config.activation, clip.config.heads) == ("gelu", (4, 4))
        assert distance(clip, saved) < 1e-5


def test_wrong_settings_would_be_seen(saved: Saved) -> None:
    for wrong in ({"activation": "quick_gelu"}, {"heads": (5, 4)}, {"heads": (4, 2)}):
        assert distance(load_quietly(saved.folder, **wrong), saved) > 1e-3


def test_the_caller_comes_first(saved: Saved, tmp_path: Path) -> None:
    (weights,) = saved.folder.glob("*model.*")
    alone = Path(shutil.copy(weights, tmp_path / f"alone{weights.suffix}"))
    assert distance(load_quietly(alone, activation="gelu", heads=(4, 4)), saved) < 1e-5
    describe(tmp_path, "damaged", "config.json")
    (tmp_path / "open_clip_config.json").write_text("{")
    assert load_quietly(alone, activation="gelu", heads=4).config.heads == (4, 2)


def test_weights_alone_are_loaded_with_one_warning(saved: Saved, tmp_path: Path) -> None:
    (weights,) = saved.folder.glob("*model.*")
    alone = shutil.copy(weights, tmp_path)
    words = r"assumed QuickGELU and 5 and 2 heads \(vision and text, 64 channels each\); pass `act"
    with pytest.warns(UserWarning, match=words) as caught:
        assert load_clip(alone).config.heads == (5, 2)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="assumed QuickGELU; pass"):
        load_clip(alone, heads=4)
    with pytest.warns(UserWarning, match="assumed 5 and 2 heads"):
        load_clip(alone, activation="gelu")


@pytest.mark.parametrize("safe", [True, False])
def test_shards(safe: bool, tmp_path: Path) -> None:
    options = {} if safe else {"safe_serialization": False}
    saved = save_transformers(tmp_path, max_shard_size="1MB", **options)
    if not safe and not list(tmp_path.glob("*.bin.index.json")):  # newer versions write one form
        rewrite_as_pickles(tmp_path)
    assert len(list(tmp_path.glob("*-of-*"))) > 2
    (index,) = tmp_path.glob("*.index.json")
    for source in (tmp_path, index):
        assert distance(load_quietly(source), saved) < 1e-5
    next(tmp_path.glob("*-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"-of-.* is missing, which .*index\.json names"):
        load_clip(tmp_path)


def rewrite_as_pickles(folder: Path) -> None:
    """The same shards in the older form."""
    peer = pytest.importorskip("safetensors.torch")
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()
    for shard in folder.glob("*.safetensors"):
        torch.save(peer.load_file(shard), folder / f"pytorch_{shard.stem}.bin")
        shard.unlink()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_prefixes_of_wrappers(prefix: str, saved: Saved, tmp_path: Path) -> None:
    plain = load_quietly(saved.folder)
    for state in (plain.state_dict(), to_hugging_face(plain.state_dict())):
        torch.save({prefix + name: t for name, t in state.items()}, tmp_path / "a.pt")
        clip = load_quietly(tmp_path / "a.pt", activation="gelu", heads=(4, 4))
        assert distance(clip, saved) < 1e-5


# --- our own files ------------------------------------------------------------------------------


def test_own_files_remember_activation_and_heads(saved: Saved, tmp_path: Path) -> None:
    save_clip(load_quietly(saved.folder).half().float(), tmp_path / "own.pt")
    describe(tmp_path, {"model_type": "clip"}, "config.json")  # of something else: not asked
    clip = load_quietly(tmp_path / "own.pt")
    assert (clip.config.activation, clip.config.heads) == ("gelu", (4, 4))
    assert distance(clip, saved) < 0.02  # float16


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("activation", None, "must name its activation and its heads"),
        ("activation", "relu", "`activation` must be one of quick_gelu, gelu, got 'relu'"),
        ("heads", 2, "must name its activation and its heads"),
        ("heads", [3, 1], "must be a multiple of its 3 attention heads, got 128"),
        ("heads", ["2", 1], "must be a multiple of its '2' attention heads"),
        ("heads", [0, 1], "must be a multiple of its 0 attention heads"),
    ],
)
def test_damaged_own_files(name: str, value: object, reason: str, tmp_path: Path) -> None:
    content = torch.load(save_own(small_clip(), tmp_path), weights_only=True)
    torch.save({**content, name: value}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=rf"bad\.pt .*{reason}"):
        load_clip(tmp_path / "bad.pt")
    del content[name]
    torch.save(content, tmp_path / "old.pt")
    if name == "heads":  # as before they were saved
        assert load_quietly(tmp_path / "old.pt").config.heads == (2, 1)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "", "QuickGELU", 1])
def test_unknown_activations(activation: Any) -> None:
    with pytest.raises(ValueError, match="`activation` must be one of quick_gelu, gelu, got"):
        load_clip("no file is read", activation=activation)
    with pytest.raises(ValueError, match="`activation` must be one of quick_gelu, gelu, got"):
        CLIPConfig(activation=activation)


@pytest.mark.parametrize("heads", [0, -1, True, 1.5, "4", (), (1, 2, 3), (4, None), [4, 4]])
def test_unusable_heads(heads: Any) -> None:
    with pytest.raises(ValueError, match="`heads` must be one or two positive whole numbers, got"):
        load_clip("no file is read", heads=heads)


def test_heads_that_do_not_divide_the_width(saved: Saved) -> None:
    with pytest.raises(ValueError, match="`vision_width` must be a multiple of its 3 .* got 320"):
        load_clip(saved.folder, heads=3)
    with pytest.raises(ValueError, match="`text_width` must be a multiple of its 7 .* got 128"):
        load_clip(saved.folder, heads=(4, 7))


def test_sizes_of_openai_need_no_settings() -> None:
    from cliptteacher.clip.model import OPENAI_SIZES

    known = [(c.vision_width, c.patch_size, c.image_size, c.heads) for c in OPENAI_SIZES.values()]
    assert known == [
        *((768, 16, 224, (12, 8)), (768, 32, 224, (12, 8))),
        *((1024, 14, 224, (16, 12)), (1024, 14, 336, (16, 12))),
    ]
    assert [(c.embed_dim, c.vision_layers, c.text_layers) for c in OPENAI_SIZES.values()] == [
        *((512, 12, 12), (512, 12, 12), (768, 24, 12), (768, 24, 12)),
    ]


def test_weights_of_an_openai_size_are_loaded_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clip = small_clip()
    torch.save(clip.state_dict(), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="of sizes that no CLIP of OpenAI has"):
        load_clip(tmp_path / "a.pt")
    monkeypatch.setattr("cliptteacher.clip.weights.OPENAI_SIZES", {"known": clip.config})
    assert load_quietly(tmp_path / "a.pt").config == clip.config


# --- the files beside the weights ---------------------------------------------------------------

WEIGHTS = {"visual.class_embedding": torch.empty(768), "ln_final.weight": torch.empty(512)}


def read(folder: Path, content: object, name: str, hugging_face: bool = True) -> Settings:
    describe(folder, content, name)
    return read_settings(folder, WEIGHTS, hugging_face=hugging_face)


def vision(**section: object) -> dict[str, object]:
    return {"vision_config": section}


def model(**section: object) -> dict[str, object]:
    return {"model_cfg": {"vision_cfg": {}, **section}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model_type": "clip"}, Settings("quick_gelu", 12, 8)),  # its defaults are OpenAI's B/32
        (vision(hidden_act="quick_gelu", num_attention_heads=6), Settings("quick_gelu", 6, 8)),
        ({"recipe": "paper"}, Settings()),
        ({"model_type": "siglip", "vision_config": {"hidden_size": 9}}, Settings()),
        ([], Settings()),
    ],
)
def test_files_of_transformers(content: object, expected: Settings, tmp_path: Path) -> None:
    assert read(tmp_path, content, "config.json") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (model(), Settings("gelu", 12, 8)),  # without `quick_gelu` an open_clip model has GELU
        (model()["model_cfg"], Settings("gelu", 12, 8)),  # the bare form, as in its own folder
        (model(quick_gelu=True, text_cfg={"heads": 4}), Settings("quick_gelu", 12, 4)),
        (model(vision_cfg={"head_width": 96}, text_cfg=None), Settings("gelu", 8, 8)),
        (model(act="quick_gelu"), Settings("quick_gelu", 12, 8)),
        ({"model_cfg": {}}, Settings()),
        ([], Settings()),
    ],
)
def test_files_of_open_clip(content: object, expected: Settings, tmp_path: Path) -> None:
    assert read(tmp_path, content, "open_clip_config.json") == expected


def test_the_file_of_the_naming_counts_first(tmp_path: Path) -> None:
    describe(tmp_path, {"model_type": "clip"}, "config.json")
    assert read(tmp_path, model(), "open_clip_config.json").activation == "quick_gelu"
    assert read_settings(tmp_path, WEIGHTS, hugging_face=False).activation == "gelu"
    describe(tmp_path, {"recipe": "paper"}, "config.json")
    assert read_settings(tmp_path, WEIGHTS, hugging_face=True).activation == "gelu"


REFUSED: list[tuple[object, str]] = [
    (vision(hidden_size=1024), "1024 channels to 'visual.class_embedding', which has .*768"),
    (vision(num_attention_heads="12"), "`num_attention_heads` must be a positive whole number"),
    (vision(num_attention_heads=True), "`num_attention_heads` must be a positive whole number"),
    (vision(layer_norm_eps=1e-6), "`layer_norm_eps` must be 1e-05 to be a teacher, got 1e-06"),
    ({"vision_config": [1]}, "`vision_config` must be an object, got"),
    (model(vision_cfg=3), "`vision_cfg` must be an object"),
    (model(text_cfg={"width": 640}), "640 channels to 'ln_final.weight', which has .*512"),
    (model(vision_cfg={"head_width": 0}), "`head_width` must be a positive whole number, got 0"),
    (model(vision_cfg={"pool_type": "avg"}), "`pool_type` must be 'tok' to be a teacher"),
    (model(text_cfg={"pool_type": "last"}), "`pool_type` must be 'argmax' to be a teacher"),
    (model(text_cfg={"no_causal_mask": True}), "`no_causal_mask` must be False"),
    (model(vision_cfg={"norm_kwargs": {"eps": 1e-6}}), "`norm_kwargs` must be {}"),
    (model(quick_gelu="yes"), "`quick_gelu` must be true or false, got 'yes'"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_files_of_other_models_are_refused(content: Any, reason: str, tmp_path: Path) -> None:
    name = "config.json" if "vision_config" in content else "open_clip_config.json"
    with pytest.raises(ValueError, match=rf"{name} must describe .*{reason}.*; put the file of"):
        read(tmp_path, content, name)


@pytest.mark.parametrize("text", ["{", "", '{"a": "\udcff"}', '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_damaged_files_beside_the_weights(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{name} must hold JSON, .*or remove this one and pass"):
        read_settings(tmp_path, WEIGHTS, hugging_face=True)


def test_an_unknown_activation_of_a_file(tmp_path: Path) -> None:
    write_safetensors(to_hugging_face(small_clip().state_dict()), tmp_path / "model.safetensors")
    towers: Callable[..., dict[str, Any]] = lambda vision, text: {  # noqa: E731
        "vision_config": {"hidden_size": 128, "hidden_act": vision, "num_attention_heads": 2},
        "text_config": {"hidden_size": 64, "hidden_act": text, "num_attention_heads": 1},
    }
    for content, reason in (
        (towers("gelu_new", "gelu_new"), "got 'gelu_new'"),
        (towers("gelu", "quick_gelu"), "got 'gelu and quick_gelu'"),
    ):
        describe(tmp_path, content, "config.json")
        with pytest.raises(ValueError, match=f"`activation` must be one of .*, {reason}"):
            load_clip(tmp_path)
        assert load_quietly(tmp_path, activation="gelu").config.activation == "gelu"
