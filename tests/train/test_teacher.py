"""Distillation: a network learns what another one says of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hwnas.config import DataConfig, Experiment, TrainConfig
from hwnas.core.arch import Architecture
from hwnas.engine import Distillation
from hwnas.errors import ConfigError
from hwnas.nn.checkpoint import load_network, save_network
from hwnas.nn.network import Network, network_of
from hwnas.runs import JsonLines
from hwnas.train.teacher import Teacher, teacher_hashes
from tests.commands import run
from tests.conftest import digits_space, write_tiny
from tests.train.rectangles import settings

torch.set_num_threads(1)


GREY = {"name": "digits", "resolution": 16, "channels": 1}
COLOUR = {"name": "npz", "path": "x", "resolution": 48, "mean": [0.4] * 3, "std": [0.2] * 3}


def teacher_of(source: Path | str, data: dict[str, Any] = GREY, **train: Any) -> Teacher:
    config = TrainConfig(teacher=str(source), **{f"teacher_{key}": train[key] for key in train})
    return Teacher(config, DataConfig.model_validate(data))


def timm_model(name: str, path: Path, **options: Any) -> nn.Module:
    """A model of timm with random weights and BN statistics, which are saved to a file."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return network.eval()


def teacher(path: Path, classes: int = 10) -> Network:
    space = digits_space().model_copy(update={"classes": classes})
    arch: Architecture = space.decode(space.at([0, 0, 0]))
    network = network_of(arch, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # sure of what it says, whatever that is
        network.blocks[-1].get_parameter("linear.weight").mul_(300)
    save_network(network, path)
    return network.eval()


def test_probabilities_are_the_networks_at_its_own_resolution(tmp_path: Path) -> None:
    network = teacher(tmp_path / "teacher.safetensors")
    x_NCHW = torch.randn(4, 1, 16, 16)
    found = teacher_of(tmp_path / "teacher.safetensors").probabilities(x_NCHW)
    smaller = F.interpolate(x_NCHW, size=(8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(found, network(smaller).softmax(1))
    assert not found.requires_grad


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(tmp_path: Path) -> None:
    """A teacher that is wrong about every image is followed further than the labels are."""
    network = teacher(tmp_path / "teacher.safetensors")
    config = write_tiny(tmp_path)
    agreements = {}
    for name, taught in (("alone", ()), ("taught", ("train.teacher=teacher.safetensors",))):
        chosen = ("train.arch=0 0 0", "train.epochs=4", *taught)
        options = [argument for setting in chosen for argument in ("-s", setting)]
        run(["train", str(config), "--out", str(tmp_path / name), "-q", *options], cwd=tmp_path)
        student = load_network(tmp_path / name / "train" / "model.safetensors").eval()
        x_NCHW = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            same = student(x_NCHW).argmax(1) == network(x_NCHW).argmax(1)
        agreements[name] = float(same.float().mean())
    assert agreements["taught"] > agreements["alone"] + 0.15
    rows = JsonLines(tmp_path / "taught" / "train" / "metrics.jsonl").read()
    assert rows[0]["loss"] > 4.0  # two cross-entropies of ten classes


@pytest.mark.parametrize("classes", [7, 12])
def test_a_teacher_of_other_classes_is_refused(classes: int, tmp_path: Path) -> None:
    teacher(tmp_path / "model.safetensors", classes)
    with pytest.raises(ConfigError, match=f"for {classes} classes and 1 channels, but the data"):
        teacher_of(tmp_path)


def test_an_absent_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.teacher = .* has no model\.safetensors"):
        teacher_of(tmp_path)


def test_a_detector_has_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.teacher teaches classifiers"):
        Experiment.model_validate(settings(tmp_path, teacher="x"))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0"])
def test_a_timm_model_sees_its_own_size_and_normalisation(name: str, tmp_path: Path) -> None:
    """mobilenetv3_small_050 is for ImageNet's mean, efficientnet_lite0 for 0.5 or ImageNet's,
    as timm says.
    """
    network = timm_model(name, tmp_path / "a.pth", num_classes=10)
    pixels_NCHW = torch.rand(2, 3, 48, 48)
    x_NCHW = (pixels_NCHW - 0.4) / 0.2
    found = teacher_of(tmp_path / "a.pth", COLOUR, model=name).probabilities(x_NCHW)
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    mean_C11, std_C11 = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    sized = F.interpolate(
        (pixels_NCHW - mean_C11) / std_C11, size=224, mode="bilinear", antialias=True
    )
    with torch.no_grad():
        torch.testing.assert_close(found, network(sized).softmax(1), rtol=1e-4, atol=1e-6)


def test_a_timm_model_of_grey_images(tmp_path: Path) -> None:
    """Its mean and standard deviation are averages over the colours."""
    name = "mobilenetv3_small_050"
    network = timm_model(name, tmp_path / "a.pth", num_classes=10, in_chans=1)
    data = {**GREY, "mean": [0.3], "std": [0.35]}
    x_N1HW = torch.randn(2, 1, 16, 16)
    found = teacher_of(tmp_path / "a.pth", data, model=name).probabilities(x_N1HW)
    pixels = x_N1HW * 0.35 + 0.3
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    sized = F.interpolate((pixels - mean) / std, size=224, mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(found, network(sized).softmax(1), rtol=1e-4, atol=1e-6)


def test_a_name_of_timm_is_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tf_efficientnet_lite0.in1k"
    monkeypatch.setattr("hwnas.nn.pretrained.try_to_load_from_cache", lambda *names: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    data = {**COLOUR, "classes": 1000}
    with pytest.raises(ConfigError, match=r"train\.teacher = .* not in the cache"):
        teacher_of(name, data)
    config = timm.get_pretrained_cfg(name)
    assert config is not None and config.url
    path = tmp_path / "hub" / "checkpoints" / Path(config.url).name
    network = timm_model(name, path)
    taken = teacher_of(name, data).network
    for key, tensor in network.state_dict().items():
        assert torch.equal(taken.state_dict()[key], tensor), key
    assert teacher_hashes(name, None)["teacher model"] == name


def test_what_a_training_depends_on_says_which_teacher_it_was(tmp_path: Path) -> None:
    teacher(tmp_path / "own.safetensors")
    timm_model("mobilenetv3_small_050", tmp_path / "a.pth", num_classes=10)
    assert set(teacher_hashes(str(tmp_path / "own.safetensors"), None)) == {"teacher"}
    hashes = teacher_hashes(str(tmp_path / "a.pth"), "mobilenetv3_small_050")
    assert hashes["teacher model"] == "mobilenetv3_small_050"


def test_a_file_without_the_name_of_its_model_is_refused(tmp_path: Path) -> None:
    network = timm_model("mobilenetv3_small_050", tmp_path / "a.pth", num_classes=10)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(ConfigError, match=r"set train\.teacher_model to the timm model"):
            teacher_of(tmp_path / name, COLOUR)
    found = teacher_of(tmp_path / "a.safetensors", COLOUR, model="mobilenetv3_small_050")
    assert found.resolution == 224
    with pytest.raises(ConfigError, match="is not the model of the weights, which lack"):
        teacher_of(tmp_path / "a.pth", COLOUR, model="mnasnet_small")


def test_a_super_net_is_no_teacher(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "supernet.safetensors", {"supernet": "{}"})
    with pytest.raises(ConfigError, match=r"train\.teacher = .* is a super-net: name a trained"):
        teacher_of(tmp_path / "supernet.safetensors", COLOUR)


@pytest.mark.parametrize("changes", [{"classes": 7}, {"channels": 1, "mean": [0.4], "std": [0.2]}])
def test_a_timm_model_of_other_classes_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    timm_model("mobilenetv3_small_050", tmp_path / "a.pth", num_classes=10)
    with pytest.raises(ConfigError, match=r"does not fit .* trained on the same classes") as caught:
        teacher_of(tmp_path / "a.pth", {**COLOUR, **changes}, model="mobilenetv3_small_050")
    assert str(caught.value).count(". ") == 0


def test_the_global_generator_is_left_as_it_was(tmp_path: Path) -> None:
    timm_model("mobilenetv3_small_050", tmp_path / "a.pth", num_classes=10)
    state = torch.get_rng_state()
    teacher_of(tmp_path / "a.pth", COLOUR, model="mobilenetv3_small_050")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("share", "temperature"), [(0.5, 1.0), (0.9, 4.0), (1.0, 2.0)])
def test_the_loss_by_hand(share: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, theirs = torch.randn(2, 6, 4, generator=generator)
    y = torch.tensor([0, 1, 2, 3, 0, 0])
    loss = F.cross_entropy(logits, y)
    soft_labels = (theirs / temperature).softmax(1)
    found = Distillation(share, temperature)(loss, logits, soft_labels)
    log_p = (logits / temperature).log_softmax(1)
    soft_loss = -(soft_labels * log_p).sum(1).mean()
    expected = 2 * ((1 - share) * loss + share * temperature**2 * soft_loss)
    torch.testing.assert_close(found, expected)
    if (share, temperature) == (0.5, 1.0):
        assert torch.equal(found, loss + F.cross_entropy(logits, soft_labels))


def test_the_gradient_keeps_its_size_at_a_high_temperature() -> None:
    """Hinton et al., equation 4: T^2 times the gradient of the soft loss tends to
    (student - teacher) / K, with zero-mean logits of K classes.
    """
    logits = torch.tensor([[1.0, -1.0, 0.5, -0.5]], requires_grad=True)
    theirs = torch.tensor([[-2.0, 2.0, 0.0, 0.0]])
    soft_labels = (theirs / 100).softmax(1)
    loss = Distillation(share=1.0, temperature=100.0)(torch.zeros(()), logits, soft_labels)
    [gradient] = torch.autograd.grad(loss / 2, logits)
    torch.testing.assert_close(gradient, (logits - theirs) / 4, rtol=0.05, atol=0.02)


def test_the_teacher_answers_at_its_temperature(tmp_path: Path) -> None:
    teacher(tmp_path / "model.safetensors")
    x_NCHW = torch.randn(4, 1, 8, 8)
    sharp = teacher_of(tmp_path).probabilities(x_NCHW)
    soft = teacher_of(tmp_path, temperature=3.0).probabilities(x_NCHW)
    torch.testing.assert_close(soft, (sharp.log() / 3).softmax(1))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"teacher_model": "mnasnet_100"}, r"needs train\.teacher, which is not set"),
        ({"teacher_share": 1.5}, "teacher_share"),
        ({"teacher_temperature": 0.0}, "teacher_temperature"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig.model_validate(train)


def test_the_defaults_are_not_part_of_a_document() -> None:
    content = TrainConfig(teacher="x", teacher_share=0.5, teacher_temperature=1.0).model_dump()
    assert [key for key in content if key.startswith("teacher")] == ["teacher"]
