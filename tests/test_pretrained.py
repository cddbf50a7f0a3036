"""Backbones of timm and CLIP. Both packages are optional: without them all but one of these tests are skipped."""

import json
import sys

import pytest
import replicas
import torch
import torch.nn.functional as F

import data
import models
from files import InputError

WHY = "an optional requirement, see requirements-optional.txt"


@pytest.mark.parametrize("arch", ["timm:resnet18", "clip:ViT-B-32"])
def test_a_package_that_is_not_there_is_named(arch, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=rf"--arch {arch}: needs .*pip install"):
        models.build(arch, 7, (3, 32, 32), "none")


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_timm_models_are_classifiers(name):
    pytest.importorskip("timm", reason=WHY)
    torch.manual_seed(0)
    model = models.build(f"timm:{name}", 7, (1, 32, 32), "none")
    assert model.training
    logits, features = model.eval()(torch.rand(2, 1, 32, 32), return_features=True)
    assert logits.shape == (2, 7) and features.shape == (2, model.head.in_features)
    torch.testing.assert_close(logits, model.head(features))


def test_timm_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm", reason=WHY)
    whole = timm.create_model("resnet10t")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model = models.build("timm:resnet10t", 7, (3, 32, 32), str(tmp_path / "whole.pth"))
    assert torch.equal(model.backbone.conv1[0].weight, whole.conv1[0].weight)
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(
        InputError, match=r"wrong.pth: does not fit the model; missing: conv1.0.weight.*unexpected: other"
    ):
        models.build("timm:resnet10t", 7, (3, 32, 32), str(tmp_path / "wrong.pth"))
    with pytest.raises(InputError, match=r"--arch timm:resnet18x: timm .* has no such model"):
        models.build("timm:resnet18x", 7, (3, 32, 32), "none")
    with pytest.raises(InputError, match="needs images of 224x224, these are 32x32"):
        models.build("timm:vit_tiny_patch16_224", 7, (3, 32, 32), "none")


@pytest.fixture
def tiny(tmp_path):
    """A tiny CLIP with random weights, saved as a state dict; its real tokenizer."""
    open_clip = pytest.importorskip("open_clip", reason=WHY)
    (tmp_path / "tiny.json").write_text(json.dumps(replicas.TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(3)
    clip = open_clip.create_model("tiny").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return open_clip, clip, str(tmp_path / "clip.pt")


def task(classes, side, **recipe):
    images = torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(images, torch.arange(6) % len(classes), {})
    seen = torch.tensor([True] + [False] * (len(classes) - 1))
    return data.Task("vtab", "clip", "eurosat", classes, seen, None, None, split, split, {}, recipe, "1")


def test_clip_is_its_own_source_model(tiny, tmp_path):
    open_clip, clip, path = tiny
    classes = ["AnnualCrop", "Sea_Lake", "apartment_building/outdoor"]
    given = task(classes, 32, prompt="a satellite photo of {}.")
    model = models.source_model(given, "clip:tiny", weights=path, cache=tmp_path)
    # logits as CLIP itself makes them: its own preprocessing, its own tokens, cosine times the scale
    tokens = open_clip.get_tokenizer("tiny")(
        [f"a satellite photo of {name}." for name in ("annual crop", "sea lake", "apartment building outdoor")]
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    with torch.no_grad():
        image = F.normalize(clip.encode_image((given.target_test.images / 255 - mean) / std), dim=-1)
        want = clip.logit_scale.exp() * image @ F.normalize(clip.encode_text(tokens), dim=-1).T
        logits, features = model(given.target_test.images, return_features=True)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    assert not model.head.bias.any()
    again = models.source_model(given, "clip:tiny", weights=path, cache=tmp_path)  # from the cache
    assert torch.equal(again.head.weight, model.head.weight) and len(list(tmp_path.glob("*/*.pt"))) == 1
    other = models.source_model(task(classes, 32, prompt="a {}."), "clip:tiny", weights=path, cache=tmp_path)
    assert not torch.equal(other.head.weight, model.head.weight)
    # images of another size are resized to CLIP's
    assert models.source_model(task(classes, 20), "clip:tiny", weights=path, cache=tmp_path)(
        task(classes, 20).target_test.images
    ).shape == (6, 3)


def test_what_is_wrong_with_a_clip_is_said(tiny, tmp_path):
    given = task(["a", "b"], 32)
    for arch, weights, message in [
        ("clip:ViT-B-33", "none", "--arch clip:ViT-B-33: open_clip has no such model; it has .*ViT-B-32"),
        ("clip:ViT-B-32", "mine", "--weights mine: neither a file nor none nor a tag of open_clip's ViT-B-32: openai"),
        ("clip:ViT-B-32", None, "another activation than the weights openai; take clip:ViT-B-32-quickgelu"),
        ("clip:ViT-B-32", tiny[2], "does not fit the model; missing"),
        ("resnet18", None, "--arch resnet18: vtab has no source images, so it takes a clip:NAME"),
    ]:
        with pytest.raises(InputError, match=message):
            models.source_model(given, arch, weights=weights, cache=tmp_path / "new")
    assert not (tmp_path / "new").exists()
