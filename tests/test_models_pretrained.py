"""Backbones of timm and CLIP. Both packages are optional: without them all but one of these tests are skipped."""

import json
import sys

import numpy as np
import pytest
import replicas
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import pil_to_tensor

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


def task(classes, side):
    images = torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(images, torch.arange(6) % len(classes), {})
    seen = torch.tensor([True] + [False] * (len(classes) - 1))
    return data.Task("vtab", "clip", "eurosat", classes, seen, None, None, split, split, {}, {}, "1")


CLASSES = ["AnnualCrop", "Sea_Lake", "apartment_building/outdoor"]
READABLE = ["annual crop", "sea lake", "apartment building outdoor"]


def zero_shot(open_clip, clip, images):
    """CLIP's logits as its paper makes them: the cosine to the mean of a class's embeddings, times the scale."""
    tokenize, rows = open_clip.get_tokenizer("tiny"), []
    with torch.no_grad():
        for name in READABLE:
            prompts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
            embeddings = F.normalize(clip.encode_text(tokenize(prompts)), dim=1)
            rows.append(F.normalize(embeddings.mean(0), dim=0))
        features = F.normalize(clip.encode_image(images), dim=1)
        return clip.logit_scale.exp() * features @ torch.stack(rows).T


def test_clip_is_its_own_source_model(tiny, tmp_path):
    open_clip, clip, path = tiny
    given = task(CLASSES, 32)
    model = models.source_model(given, "clip:tiny", weights=path, cache=tmp_path)
    images = given.target_test.images
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    with torch.no_grad():
        logits, features = model(images, return_features=True)
    torch.testing.assert_close(logits, zero_shot(open_clip, clip, (images / 255 - mean) / std), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    assert not model.head.bias.any()
    again = models.source_model(given, "clip:tiny", weights=path, cache=tmp_path)  # from the cache
    assert torch.equal(again.head.weight, model.head.weight) and len(list(tmp_path.glob("*/*.pt"))) == 1


def test_clip_on_photographs_is_open_clips_own_pipeline(tiny, tmp_path):
    open_clip, clip, path = tiny
    sides = [(33, 57), (91, 47), (32, 75), (201, 32), (41, 41), (20, 31), (27, 19), (64, 33), (131, 97), (300, 211)]
    rng, photos = np.random.default_rng(0), []
    for i, (width, height) in enumerate(sides):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg")
        photos.append(Image.open(tmp_path / f"{i}.jpg"))
    # open_clip's side
    preprocess = open_clip.image_transform(32, False, clip.visual.image_mean, clip.visual.image_std)
    want = zero_shot(open_clip, clip, torch.stack([preprocess(photo) for photo in photos]))
    # ours: uint8 squares, whose normalisation belongs to the model
    crop = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), PILToTensor()])
    images = torch.stack([crop(photo) for photo in photos])
    given = task(CLASSES, 32)
    given.target_test = data.Split(images, torch.zeros(10, dtype=torch.long), {})
    model = models.source_model(given, "clip:tiny", weights=path, cache=tmp_path)
    got = torch.from_numpy(models.predict(model, given.target_test.images))
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    squashed = torch.stack([pil_to_tensor(photo.resize((32, 32), Image.Resampling.BILINEAR)) for photo in photos])
    assert not torch.allclose(torch.from_numpy(models.predict(model, squashed)), want, atol=0.01)


def test_a_clip_of_a_new_head_has_its_classes(tiny):
    model = models.build("clip:tiny", 7, (3, 32, 32), tiny[2])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_clip_may_be_a_resnet(tiny, tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    (tmp_path / "tiny-resnet.json").write_text(json.dumps(replicas.TINY_CLIP | {"vision_cfg": vision}))
    tiny[0].add_model_config(tmp_path / "tiny-resnet.json")
    model = models.build("clip:tiny-resnet", 7, (3, 24, 24), "none").eval()
    features = model(torch.zeros(2, 3, 24, 24), return_features=True)[1]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_what_is_wrong_with_a_clip_is_said(tiny, tmp_path):
    wrong = str(tmp_path / "wrong.pt")
    torch.save({"other": torch.zeros(1)}, wrong)
    for arch, weights, message in [
        ("clip:coca_ViT-B-32", "none", "clip:coca_ViT-B-32: gives tokens .* take clip:ViT-B-32"),
        ("clip:ViT-B-33", "none", "--arch clip:ViT-B-33: open_clip has no such model; it has .*ViT-B-32"),
        ("clip:ViT-B-32", "mine", "--weights mine: neither a file nor a tag of open_clip's ViT-B-32; it has openai"),
        ("clip:ViT-B-32", None, "another activation than the weights openai; take clip:ViT-B-32-quickgelu"),
        ("clip:ViT-B-32", "none", "clip:ViT-B-32: needs images of 224x224, these are 48x48; .* take --image-size 224"),
        ("clip:tiny", wrong, "does not fit the model; missing"),
        ("resnet18", None, "--arch resnet18: vtab has no source images, so it takes a clip:NAME"),
    ]:
        given = task(["a", "b"], 48 if "48x48" in message else 32)
        with pytest.raises(InputError, match=message):
            models.source_model(given, arch, weights=weights, cache=tmp_path / "new")
    assert not (tmp_path / "new").exists()
