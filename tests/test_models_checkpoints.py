"""A source model of the user's own: a file that other programs wrote, in torchvision's or timm's names."""

import pytest
import replicas
import torch
from conftest import load_task

import models
from files import InputError

NAMES = ["cup", "fork", "knife", "plate"]
ORDER = ["plate", "cup", "knife", "fork"]  # the model's, not the alphabet's


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    replicas.tree(root / "a", NAMES, 4)
    replicas.tree(root / "b", NAMES[:3], 6)
    (root / "classes.txt").write_text("\n".join(ORDER) + "\n")
    return root


@pytest.fixture
def task(photos):
    """load(**flags): the task of the two domains, where the names of the classes come with the model."""

    def load(**flags):
        where = {"source": "a", "target": "b", "data_root": str(photos), "image_size": 32}
        return load_task("folder", **where, **flags)

    return load


def network(arch, classes=4):
    """A network as its package makes it, with BatchNorm statistics that are not those of a new one."""
    if arch.startswith("timm:"):
        timm = pytest.importorskip("timm", reason="an optional requirement, see requirements-optional.txt")
        made = timm.create_model(arch.removeprefix("timm:"), num_classes=classes)
    else:
        import torchvision

        made = torchvision.models.get_model(arch, num_classes=classes)
    with torch.no_grad():
        made.train()(torch.rand(8, 3, 32, 32))
    return made.eval()


SHAPES = {
    "alone": lambda state: state,
    "under state_dict, with module.": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module.")},
    "under model, with model.": lambda state: {"model": prefixed(state, "model.")},
    "with both": lambda state: prefixed(state, "module.model."),
}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


ARCHS = ["resnet18", "mobilenet_v3_small", "timm:resnet10t", "timm:convnext_atto", "timm:vit_tiny_patch16_224"]
ARCHS += ["timm:resnetv2_50x1_bit", "mnasnet0_5"]  # a head that is a 1x1 convolution; modules of several versions


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_those_of_the_network_that_was_saved(arch, task, photos, tmp_path):
    side = 224 if "vit" in arch else 32
    theirs = network(arch) if side == 32 else pytest.importorskip("timm").create_model(arch[5:], num_classes=4).eval()
    path = str(tmp_path / "hers.pth")
    torch.save(theirs.state_dict(), path)
    given = task(source_checkpoint=path, classes=str(photos / "classes.txt"))
    given.target_train.images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    model = models.source_model(given, arch, checkpoint=path)
    images = torch.rand(3, 3, side, side)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    if arch.startswith("timm:"):
        mean, std = (torch.tensor(theirs.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs((images - mean) / std), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_how_a_state_dict_is_kept(shape, task, photos, tmp_path):
    state, path = network("resnet18").state_dict(), str(tmp_path / "hers.pth")
    torch.save(SHAPES[shape](state), path)
    given = task(source_checkpoint=path, classes=str(photos / "classes.txt"))
    model = models.source_model(given, "resnet18", checkpoint=path)
    assert torch.equal(model.head.weight, state["fc.weight"]) and model.mean.flatten().tolist() != [0.5] * 3
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize("arch", ["squeezenet1_1", "googlenet", "inception_v3"])
def test_networks_without_one_linear_head_are_refused(arch):
    with pytest.raises(InputError, match=rf"^--arch {arch}: does not end in one linear head; choose resnet50, or"):
        models.build(arch, 4, (3, 96, 96), "none")


def test_a_distilled_networks_two_heads_are_refused(task, photos, tmp_path):
    timm = pytest.importorskip("timm", reason="an optional requirement, see requirements-optional.txt")
    distilled, path = "deit_tiny_distilled_patch16_224", str(tmp_path / "hers.pth")
    torch.save(timm.create_model(distilled, num_classes=4).state_dict(), path)
    given = task(source_checkpoint=path, classes=str(photos / "classes.txt"))
    given.target_train.images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    with pytest.raises(
        InputError, match=r"hers.pth: has two heads \(head, head_dist\); distilled networks are not off"
    ):
        models.source_model(given, f"timm:{distilled}", checkpoint=path)


def test_a_head_without_bias_has_one_of_zeros(task, photos, tmp_path):
    theirs, path = network("resnet18"), str(tmp_path / "hers.pth")
    state = theirs.state_dict()
    state.pop("fc.bias")
    torch.save(state, path)
    given = task(source_checkpoint=path, classes=str(photos / "classes.txt"))
    model = models.source_model(given, "resnet18", checkpoint=path)
    assert torch.equal(model.head.bias, torch.zeros(4)) and torch.equal(model.head.weight, state["fc.weight"])


def test_classes_are_in_the_models_order(task, photos, tmp_path):
    path = str(tmp_path / "hers.pth")
    torch.save(network("resnet18").state_dict(), path)
    given = task(source_checkpoint=path, classes=str(photos / "classes.txt"))
    assert given.classes == ORDER and given.seen.tolist() == [False, True, True, True]
    for split in (given.target_train, given.target_test):
        colour = split.images[:].float().mean((2, 3))
        known = torch.tensor([[40 * i % 256, 90 * i % 256, 200 - 25 * i] for i in range(4)]).float()
        alphabetical = torch.cdist(colour, known).argmin(1)
        assert [NAMES[i] for i in alphabetical] == [ORDER[i] for i in split.labels]
    with pytest.raises(InputError, match=r"hers.pth: does not say its classes; pass --classes FILE, a name per line"):
        task(source_checkpoint=path)
    torch.save({"state_dict": network("resnet18").state_dict(), "classes": NAMES}, path)
    assert task(source_checkpoint=path).classes == NAMES, "its own list will do"


def test_what_is_wrong_is_one_line(task, photos, tmp_path):
    path, names = str(tmp_path / "hers.pth"), str(tmp_path / "classes.txt")

    def refusal(saved, listed="plate\ncup\nknife\nfork\n", arch="resnet18"):
        torch.save(saved, path)
        (tmp_path / "classes.txt").write_text(listed)
        with pytest.raises(InputError) as error:
            models.source_model(task(source_checkpoint=path, classes=names), arch, checkpoint=path)
        assert "\n" not in str(error.value)
        return str(error.value)

    state = network("resnet18").state_dict()
    assert "hers.pth: a head for 9 classes; there are 4" in refusal(network("resnet18", 9).state_dict())
    assert "the source does not know its class plate;" in refusal(state, "cup\nfork\nknife\nspoon\n")
    assert "classes.txt: must have a class name per line, each once" in refusal(state, "cup\nfork\ncup\n")
    assert "classes.txt: must have a class name per line" in refusal(state, "\n")
    assert "does not fit the model; missing: backbone" in refusal(state, arch="resnet34")
    assert refusal({1: 2}).endswith("; unexpected: 1")
    assert "--arch alexnet: does not take images of 32x32, see --image-size (" in refusal(state, arch="alexnet")
    with pytest.raises(InputError, match=r"--weights her\.pth: the source model comes trained; leave it out"):
        models.source_model(task(), "resnet18", checkpoint=path, weights="her.pth")
    assert "its classes or their order are not those of folder" in refusal({"model": state, "classes": NAMES})
    whole = refusal(network("resnet18"))
    assert "objects of a program (torchvision.models.resnet.ResNet); save the weights alone" in whole
    assert whole.endswith("torch.save(model.state_dict(), FILE)")
    torch.save(state, path)
    content = (tmp_path / "hers.pth").read_bytes()
    (tmp_path / "hers.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"--source-checkpoint .*hers.pth: not a readable checkpoint \(.*\)$"):
        task(source_checkpoint=path)
    with pytest.raises(InputError, match=r"--classes nowhere.txt: not readable as text"):
        task(source_checkpoint=path, classes="nowhere.txt")
    with pytest.raises(InputError, match=r"--classes x.txt: names the classes of a --source-checkpoint; pass that too"):
        task(classes="x.txt")
