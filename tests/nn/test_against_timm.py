"""The published networks against timm and torchvision: same weights, same logits."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from hwnas.core.spaces import published
from hwnas.nn.classifier import ClassificationNetwork

torch.set_num_threads(1)

TIMM = {
    "mobilenet_v2": "mobilenetv2_100",
    "mnasnet_b1": "mnasnet_100",
    "mnasnet_a1": "semnasnet_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "single_path_nas": "spnasnet_100",
    "fbnet_c": "fbnetc_100",
    **{f"efficientnet_lite{size}": f"efficientnet_lite{size}" for size in range(5)},
    **{
        f"mobilenet_v4_conv_{size}": f"mobilenetv4_conv_{size}"
        for size in ("small", "medium", "large")
    },
}
THEIRS = {
    f"timm-{name}": (name, lambda theirs=theirs: timm.create_model(theirs))
    for name, theirs in TIMM.items()
}
WIDER_AND_NARROWER = {
    "mobilenetv2_035": "mobilenet_v2-w0.35",
    "mobilenetv2_050": "mobilenet_v2-w0.5",
    "mobilenetv2_140": "mobilenet_v2-w1.4",
    "mnasnet_050": "mnasnet_b1-w0.5",
    "mnasnet_140": "mnasnet_b1-w1.4",
    "semnasnet_075": "mnasnet_a1-w0.75",
    "mobilenetv3_large_075": "mobilenet_v3_large-w0.75",
    "mobilenetv3_small_075": "mobilenet_v3_small-w0.75",
    "mobilenetv3_small_050": "mobilenet_v3_small-w0.5",
    "mobilenetv4_conv_small_035": "mobilenet_v4_conv_small-w0.35",
    "mobilenetv4_conv_small_050": "mobilenet_v4_conv_small-w0.5",
}
THEIRS |= {
    f"timm-{theirs}": (name, lambda theirs=theirs: timm.create_model(theirs))
    for theirs, name in WIDER_AND_NARROWER.items()
}
THEIRS |= {
    f"timm-efficientnet_v2_b{size}": (
        f"efficientnet_v2_b{size}",
        lambda size=size: timm.create_model(f"tf_efficientnetv2_b{size}", pad_type="", bn_eps=1e-5),
    )
    for size in range(4)
}
THEIRS |= {
    f"torchvision-mobilenet_v2-{width}": (
        f"mobilenet_v2-w{width}",
        lambda width=width: torchvision.models.mobilenet_v2(width_mult=width),
    )
    for width in (0.35, 0.5, 0.75, 1.4)
}
THEIRS |= {
    f"torchvision-mnasnet-{width}": (
        f"mnasnet_b1-w{width}",
        lambda width=width: torchvision.models.MNASNet(width),
    )
    for width in (0.5, 0.75, 1.3)
}
THEIRS |= {
    f"timm-spnasnet-{width}": (
        f"single_path_nas-w{width}",
        lambda width=width: timm.models.efficientnet._gen_spnasnet("spnasnet_100", width),
    )
    for width in (0.5, 1.4)
}
THEIRS |= {
    f"timm-fbnetc-{width}": (
        f"fbnet_c-w{width}",
        lambda width=width: timm.models.efficientnet._gen_fbnetc("fbnetc_100", width),
    )
    for width in (0.75, 1.4)
}
THEIRS |= {
    "torchvision-mobilenet_v2": ("mobilenet_v2", lambda: torchvision.models.mobilenet_v2()),
    "torchvision-mnasnet_b1": ("mnasnet_b1", lambda: torchvision.models.mnasnet1_0()),
}


def weighted(module: nn.Module) -> list[nn.Module]:
    """Convolutions, batch norms and linear layers in order of registration."""
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Make weights and statistics look trained: a fresh network's logits in eval mode
    are near 1e-9, and comparing them would prove nothing.
    """
    generator = torch.Generator().manual_seed(0)
    for part in weighted(module):
        if isinstance(part, nn.BatchNorm2d):
            part.weight.uniform_(0.5, 1.5, generator=generator)
            part.bias.normal_(0, 0.3, generator=generator)
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = part.weight[0].numel()
            part.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if part.bias is not None:
                part.bias.normal_(0, 0.3, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("reference", THEIRS)
@torch.inference_mode()
def test_logits_are_equal(reference: str) -> None:
    name, make = THEIRS[reference]
    theirs = make()
    randomise(theirs)
    ours = ClassificationNetwork(published(name, bn_eps=1e-5))
    pairs = list(zip(weighted(ours), weighted(theirs), strict=True))
    for mine, yours in pairs:
        assert mine.weight.shape == yours.weight.shape
        mine.load_state_dict(yours.state_dict())
    x_NCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected, logits = theirs.eval()(x_NCHW), ours.eval()(x_NCHW)
    assert expected.std() > 1e-2
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # images matter, not only biases
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_differ_if_the_epsilon_does() -> None:
    """The comparison above can fail: a different BN epsilon alone breaks it."""
    theirs = timm.create_model("mobilenetv2_100").eval()
    randomise(theirs)
    ours = ClassificationNetwork(published("mobilenet_v2", bn_eps=1e-3)).eval()
    for mine, yours in zip(weighted(ours), weighted(theirs), strict=True):
        mine.load_state_dict(yours.state_dict())
    x_NCHW = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, logits = theirs(x_NCHW), ours(x_NCHW)
    assert (logits - expected).abs().max() > 1e-4 * expected.abs().max()


def test_proxylessnas_mobile() -> None:
    """4.08 M parameters, as in the authors' logs."""
    network = ClassificationNetwork(
        published("proxylessnas_mobile"), generator=torch.Generator().manual_seed(0)
    ).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert round(parameters / 1e6, 2) == 4.08
    assert parameters == network.arch.params
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
