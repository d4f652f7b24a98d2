"""R_BN: our ResNet against any network's BatchNorm inputs, and against loops.

Float32 tolerances: R_BN is a sum of some 50 norms, each of thousands of numbers that went through
as many layers; two formulations of the same network agreed to 1e-5 of the sum, 1e-4 is asked for.
"""

import json
import math

import pytest
import torch
import torchvision
import toys
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastrecycle.files import load_safetensors, save_safetensors
from fastrecycle.prior import (
    ModulePrior,
    ResNetPrior,
    ResNetSpec,
    load_prior,
    moment_distance,
    prior_metadata,
)
from fastrecycle.vit_config import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.usefixtures("one_thread", "poison_empty")


def pixels(count=4, side=32, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, side, side, generator=toys.generator(seed), dtype=dtype)


def settled(network, seed=0):
    """Running statistics of some images, so that no BatchNorm is at its initial 0 and 1."""
    torch.manual_seed(seed)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
    return network.eval()


class Small(nn.Module):
    """torchvision's own blocks under its own names, with few channels."""

    def __init__(self, block=BasicBlock, **arguments):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        into = 8
        for layer, (planes, stride) in enumerate(((8, 1), (12, 2), (12, 2), (16, 2)), 1):
            out = planes * block.expansion
            down = None
            if stride == 2 or into != out:
                conv = nn.Conv2d(into, out, 1, stride, bias=False)
                down = nn.Sequential(conv, nn.BatchNorm2d(out))
            blocks = block(into, planes, stride, down, **arguments), block(out, planes, **arguments)
            setattr(self, f"layer{layer}", nn.Sequential(*blocks))
            into = out
        self.fc = nn.Linear(into, 2)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def grouped():
    # torchvision's width of a grouped bottleneck is planes * base_width / 64 * groups
    return settled(Small(Bottleneck, groups=2, base_width=64))


@pytest.fixture(scope="module")
def small():
    return settled(Small())


def recorded_terms(network, x, stop=None):
    """||mean - mean_BN|| + ||var - var_BN|| of each BatchNorm, in the order of the forward pass."""
    terms = []

    def record(layer, inputs):
        values = inputs[0].double().transpose(0, 1).flatten(1)
        terms.append(
            math.dist(values.mean(1).tolist(), layer.running_mean.tolist())
            + math.dist(values.var(1, correction=0).tolist(), layer.running_var.tolist())
        )

    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(record) for m in layers]
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        network((x - mean) / std)
    for hook in hooks:
        hook.remove()
    return terms[:stop]


@pytest.mark.parametrize(
    "make", [torchvision.models.resnet18, torchvision.models.resnet50, Small, grouped]
)
def test_resnet_prior_matches_torchvision(make):
    network = settled(make())
    ours, x = ResNetPrior(network.state_dict()), pixels(2)
    expected = recorded_terms(network, x)
    assert ours.num_bn == len(expected)
    assert ours(x).item() == pytest.approx(sum(expected), rel=1e-4)
    assert ModulePrior(network)(x).item() == pytest.approx(sum(expected), rel=1e-4)


def test_resnet_prior_matches_any_network_in_gradient(small):
    x = pixels(4).requires_grad_()
    ours = torch.autograd.grad(ResNetPrior(small.state_dict())(x, 2).sum(), x)[0]
    theirs = torch.autograd.grad(ModulePrior(small)(x, 2).sum(), x)[0]
    # ReLU's kinks: rounding may put a few of 1e5 activations on the other side
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    assert theirs.norm() > 0


@pytest.mark.parametrize("last", ["bn1", "layer1", "layer3"])
def test_state_dict_that_stops_early_gives_the_first_terms(small, last):
    names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    kept = tuple(names[: names.index(last) + 1])
    state = {k: v for k, v in small.state_dict().items() if k.split(".")[0] in kept}
    ours, x = ResNetPrior(state), pixels(2)
    expected = recorded_terms(small, x, ours.num_bn)
    assert ours.num_bn == {"bn1": 1, "layer1": 5, "layer3": 15}[last]
    assert ours(x).item() == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.parametrize("make", [ResNetPrior, ModulePrior])
def test_first_bn_weighs_the_first_term_alone(small, make):
    ours = make(small.state_dict() if make is ResNetPrior else small)
    x = pixels(2)
    first = recorded_terms(small, x)[0]
    gained = (ours(x, first_bn=3.0) - ours(x)).item()
    # the difference of two float32 sums near 500
    assert gained == pytest.approx(2 * first, rel=1e-3)


def bottleneck_by_hand(state, x, stride_in, eps):
    """R_BN of a stem and bottlenecks, written out: BatchNorm by its definition."""
    total = 0.0

    def bn(name, x):
        nonlocal total
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        flat = x.transpose(0, 1).flatten(1)
        total += (flat.mean(1) - mean).square().sum().sqrt()
        total += (flat.var(1, correction=0) - var).square().sum().sqrt()
        shape = (-1, 1, 1)
        unit = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        return unit * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    def conv(name, x, stride=1):
        w = state[f"{name}.weight"]
        return nn.functional.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)

    mean, std = (
        torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    x = bn("bn1", conv("conv1", (x - mean) / std, 2)).relu()
    x = nn.functional.max_pool2d(x, 3, 2, 1)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        early, late = (stride, 1) if stride_in == "conv1" else (1, stride)
        skip = bn(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
        y = bn(f"{name}.bn1", conv(f"{name}.conv1", x, early)).relu()
        y = bn(f"{name}.bn2", conv(f"{name}.conv2", y, late)).relu()
        x = (bn(f"{name}.bn3", conv(f"{name}.conv3", y)) + skip).relu()
    return total


@pytest.mark.parametrize("stride_in", ["conv1", "conv2"])
def test_stride_of_bottlenecks_and_eps(stride_in):
    state = toys.resnet_state("bottleneck", dtype=torch.float64)
    x = pixels(3, dtype=torch.float64)
    prior = ResNetPrior(state, ResNetSpec(stride_in=stride_in, eps=0.1)).double()
    for name, tensor in state.items():  # ours keeps float32
        state[name] = tensor.float().double()
    expected = bottleneck_by_hand(state, x, stride_in, 0.1)
    assert prior(x).item() == pytest.approx(expected.item(), rel=1e-10)
    other = "conv2" if stride_in == "conv1" else "conv1"
    assert abs(bottleneck_by_hand(state, x, other, 0.1) - expected) > 1e-3 * expected
    assert abs(bottleneck_by_hand(state, x, stride_in, 1e-5) - expected) > 1e-3 * expected


@pytest.mark.parametrize("make", [ResNetPrior, ModulePrior])
def test_tasks_that_share_a_batch_keep_their_own_moments(small, make):
    ours = make(small.state_dict() if make is ResNetPrior else small)
    tasks = [pixels(3, seed=1), 0.3 * pixels(3, seed=2), pixels(3, seed=3).square()]
    together = ours(torch.cat(tasks), segments=3)
    alone = torch.cat([ours(x) for x in tasks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)
    mixed = ours(torch.cat(tasks))  # moments over all are another number
    assert abs(mixed - together.mean()) > 1e-2 * mixed
    x = torch.cat(tasks).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x, segments=3)[1], x)
    assert gradient[3:6].any()
    assert not gradient[:3].any()
    assert not gradient[6:].any()


@pytest.mark.parametrize("make", [ResNetPrior, ModulePrior])
def test_stored_variances_of_zero_pass_on_the_bias(make):
    torch.manual_seed(0)
    network = settled(Small())
    layer = network.layer1[0].bn1
    layer.running_var[:5] = 0
    layer.running_mean[:5] = 0  # the channel was constant at 0
    ours = make(network.state_dict() if make is ResNetPrior else network)
    x = pixels(2)
    got = ours(x).item()
    # a network in which those channels are cut to their bias, and whose moments count the same
    cut = settled(Small())
    cut.load_state_dict(network.state_dict())
    cut.layer1[0].bn1.weight.data[:5] = 0
    expected = sum(recorded_terms(cut, x))
    assert got == pytest.approx(expected, rel=1e-4)
    amplified = sum(recorded_terms(network, x))  # 1 / sqrt(1e-5) is 316
    assert amplified > 1.5 * expected


def test_module_prior_leaves_the_network_alone(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    prior = ModulePrior(small)
    prior(pixels(2))
    with pytest.raises(RuntimeError):
        prior(pixels(2, side=32)[:, :2])
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert not any(p.requires_grad for p in small.parameters())


def test_gradient_at_equal_moments_is_zero_not_nan():
    mu = torch.ones(2, 3, requires_grad=True)
    moment_distance(mu, mu, torch.ones(3), torch.ones(3)).sum().backward()
    assert torch.equal(mu.grad, torch.zeros(2, 3))
    far = moment_distance(
        torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]]), *torch.zeros(2, 2)
    )
    assert far.tolist() == [10.0]  # not squared: 5 + 5


# ------------------------------------------------------------------ loading


def test_load_prior_takes_modules_and_none(small):
    assert load_prior(None) is None
    assert load_prior("none") is None
    ours = load_prior(small)
    assert isinstance(ours, ModulePrior)
    assert load_prior(ours) is ours


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_whole_torchvision_file_needs_nothing_told(tmp_path, small, suffix):
    path = tmp_path / f"resnet{suffix}"
    if suffix == ".pt":
        torch.save(small.state_dict(), path)
    else:
        save_safetensors(path, small.state_dict())
    prior = load_prior(path)
    assert prior.spec == ResNetSpec()
    x = pixels(2)
    assert torch.equal(prior(x), ResNetPrior(small.state_dict())(x))


def test_ambiguous_file_is_refused_until_told(tmp_path):
    path = tmp_path / "early.safetensors"
    state = toys.resnet_state("bottleneck")
    save_safetensors(path, state)
    with pytest.raises(ValueError, match="stride_in and eps cannot be known"):
        load_prior(path)
    with pytest.raises(ValueError, match="so eps cannot be known"):
        load_prior(path, stride_in="conv1")
    told = load_prior(path, stride_in="conv1", eps=1.001e-5)
    assert told.spec == ResNetSpec(stride_in="conv1", eps=1.001e-5)
    spec = ResNetSpec("conv1", 1e-3, 1, False, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    save_safetensors(path, state, prior_metadata(spec))
    loaded = load_prior(path)
    assert loaded.spec == spec
    assert loaded(pixels(2)).isfinite().all()


def test_metadata_of_a_spec_round_trips(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"x": torch.zeros(1)}, prior_metadata(ResNetSpec(maxpool=False)))
    told = json.loads(load_safetensors(path)[1]["fastrecycle.prior"])
    assert told["maxpool"] is False
    assert told["stride_in"] == "conv2"


def test_demo_prior_is_packaged():
    try:
        prior = load_prior("demo")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert prior.num_bn >= 3
    assert prior(pixels(2, side=64)).isfinite().all()


def test_rejects_files_that_are_no_resnet(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_prior(tmp_path / "absent.safetensors")
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected a ResNet in torchvision's names"):
        load_prior(tmp_path / "x.safetensors", stride_in="conv2", eps=1e-5)
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_prior(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        load_prior(nn.Conv2d(3, 4, 1))
    state = toys.resnet_state()
    state["bn1.weight"][0] = float("nan")
    with pytest.raises(ValueError, match=r"bn1\.weight holds NaN"):
        ResNetPrior(state)
    state = toys.resnet_state()
    del state["layer2.0.conv2.weight"]
    with pytest.raises(ValueError, match=r"layer2\.0 is cut off within"):
        ResNetPrior(state)


def test_load_prior_takes_a_prior_of_the_callers_own_as_it_is():
    class Bright(torch.nn.Module):
        def forward(self, pixels, segments=1, first_bn=1.0):
            return first_bn * (1 - pixels.unflatten(0, (segments, -1)).mean((1, 2, 3, 4)))

    mine = Bright()
    assert load_prior(mine) is mine
