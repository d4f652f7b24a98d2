"""The naturalness prior R_BN (LoRA Recycle, Eq. 2): networks with BatchNorm, and their statistics.

B images, G tasks of B / G consecutive images, C channels.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastrecycle import ops
from fastrecycle.files import load_safetensors, load_torch, parse_json
from fastrecycle.vit_config import IMAGENET_MEAN, IMAGENET_STD, Triple


class Prior(Protocol):
    """Anything that scores how natural each task's images are."""

    def __call__(self, pixels: Tensor, segments: int = 1, first_bn: float = 1.0) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> R_BN of each task, (segments,) float32."""
        ...


def moment_distance(mu: Tensor, var: Tensor, stored_mu: Tensor, stored_var: Tensor) -> Tensor:
    """||mu - mu_BN||_2 + ||var - var_BN||_2 of each task: (G, C) moments -> (G,)."""
    norm = torch.linalg.vector_norm  # its gradient at 0 is 0, not NaN
    return norm(mu - stored_mu, dim=1) + norm(var - stored_var, dim=1)


def _channels(values: Triple, like: Tensor) -> Tensor:
    """(3, 1, 1). Filled on the device: a CUDA graph cannot record a copy from the host."""
    return torch.stack([like.new_full((), value) for value in values])[:, None, None]


@dataclass(frozen=True)
class ResNetSpec:
    """What the names in a ResNet's state dict do not tell."""

    stride_in: Literal["conv1", "conv2"] = "conv2"  # of a bottleneck: torchvision's is conv2
    eps: float = 1e-5  # of every BatchNorm
    stem_stride: int = 2
    maxpool: bool = True
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        number = lambda x: type(x) in (int, float) and abs(x) < 1e6  # noqa: E731
        triple = lambda x: type(x) is tuple and len(x) == 3 and all(map(number, x))  # noqa: E731
        for name, good, expected in (
            ("stride_in", self.stride_in in ("conv1", "conv2"), '"conv1" or "conv2"'),
            ("eps", number(self.eps) and self.eps >= 0, "a number of at least 0"),
            ("stem_stride", self.stem_stride in (1, 2, 4), "1, 2 or 4"),
            ("maxpool", type(self.maxpool) is bool, "true or false"),
            ("mean", triple(self.mean), "3 numbers"),
            ("std", triple(self.std) and min(self.std) > 0, "3 numbers above 0"),
        ):
            if not good:
                raise ValueError(f"{name}: must be {expected}, got {getattr(self, name)!r}")


class ResNetPrior(nn.Module):
    """A ResNet in torchvision's names, from the stem as far as its state dict goes.

    Only BatchNorm inputs matter, so a file may stop after any layer and needs no classifier.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], spec: ResNetSpec | None = None):
        super().__init__()
        self.spec = spec or ResNetSpec()
        wanted = re.compile(r"(conv1|bn1|layer\d+\.\d+\.(conv\d|bn\d|downsample\.[01]))\.\w+$")
        tensors = {k: v.float() for k, v in state_dict.items() if wanted.match(k)}
        if "conv1.weight" not in tensors or "bn1.running_var" not in tensors:
            raise ValueError(
                "prior: expected a ResNet in torchvision's names (conv1.weight, bn1.running_mean,"
                f" layer1.0.conv1.weight, ...), got {sorted(state_dict)[:3]}; pass any other"
                " network with BatchNorm2d as a module"
            )
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"prior: {name} holds NaN or infinity")
            last = name.rpartition(".")[0].rpartition(".")[2]
            if name.endswith(".weight") and (last.startswith("conv") or last == "0"):
                if tensor.ndim != 4 or not tensor.numel():
                    raise ValueError(f"prior: {name} must be a convolution's, got {_size(tensor)}")
                beside = "bn" + last[4:] if last.startswith("conv") else "1"
                bn = name.removesuffix(f"{last}.weight") + beside
                for part in ("running_mean", "running_var", "weight", "bias"):
                    found = tensors.get(f"{bn}.{part}")
                    if found is None or found.shape != tensor.shape[:1]:
                        got = "none" if found is None else _size(found)
                        raise ValueError(
                            f"prior: {bn}.{part} must be ({len(tensor)},) as {name}, got {got}"
                        )
            self.register_buffer(name.replace(".", "__"), tensor)
        self.block_names = sorted(
            {m.group(0) for k in tensors if (m := re.match(r"layer\d+\.\d+", k))},
            key=lambda name: [int(x) for x in re.findall(r"\d+", name)],
        )
        self.bottleneck = any(k.endswith("conv3.weight") for k in tensors)
        for block in self.block_names:
            for i in (1, 2, 3) if self.bottleneck else (1, 2):
                for part in (f"{block}.conv{i}.weight", f"{block}.bn{i}.running_var"):
                    if part not in tensors:
                        raise ValueError(f"prior: {block} is cut off within, {part} is missing")

    @property
    def num_bn(self) -> int:
        """Number of BatchNorms in R_BN."""
        return sum(name.endswith("running_var") for name, _ in self.named_buffers())

    def _get(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "__"))

    def _stored(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, weight and bias of a BatchNorm."""
        mean, var, weight, bias = (
            self._get(f"{name}.{part}")
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return mean, var, weight, bias

    def _has(self, name: str) -> bool:
        return name.replace(".", "__") in self._buffers

    def _conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._get(name + ".weight")
        groups = x.shape[1] // weight.shape[1]  # ResNeXt's
        return nn.functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)

    def prepared(self, dtype: torch.dtype) -> ResNetPrior:
        """The same prior with its convolution weights in this dtype, channels-last, once for all.

        Under autocast they would be cast again at every step.
        """
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        for name, weight in self.named_buffers():
            if weight.ndim == 4:
                other._buffers[name] = weight.to(dtype, memory_format=torch.channels_last)
        return other

    def _bn_names(self) -> list[str]:
        """Names of the BatchNorms in the order of the forward pass."""
        names = ["bn1"]
        for block in self.block_names:
            names += [f"{block}.downsample.1"] * self._has(f"{block}.downsample.0.weight")
            names += [f"{block}.bn{i}" for i in ((1, 2, 3) if self.bottleneck else (1, 2))]
        return names

    def forward(
        self,
        pixels: Tensor,
        segments: int = 1,
        first_bn: float = 1.0,
        impl: ops.Impl = "reference",
        normalised: bool = False,
    ) -> Tensor:
        """R_BN of each task.

        Args:
            pixels: (B, 3, S, S) in [0, 1]; normalised here with the network's own statistics.
            segments: number of tasks; B / segments consecutive images belong to one.
            first_bn: factor of the first BatchNorm's term.
            impl: code of the operations.
            normalised: whether `pixels` already are.

        Returns:
            (segments,) float32.

        """
        run = _Pass(self, segments, impl)
        self._blocks(run, run.stem(pixels, normalised), output=False)
        return run.total(first_bn)

    def features(self, pixels: Tensor, segments: int = 1) -> tuple[Tensor, Tensor]:
        """The last block's output, averaged over space, and R_BN, from one plain forward pass.

        Args:
            pixels: (B, 3, S, S) in [0, 1].
            segments: number of tasks.

        Returns:
            (B, C) features and (segments,) R_BN, float32.

        """
        run = _Pass(self, segments, "reference")
        x = self._blocks(run, run.stem(pixels, normalised=False), output=True)
        return x.mean((2, 3)), run.total(1.0)

    def _blocks(self, run: _Pass, x: Tensor, *, output: bool) -> Tensor:
        """From the stem to the last block, whose output is asked for only where it is read."""
        for name in self.block_names:
            layer, index = (int(n) for n in re.findall(r"\d+", name))
            stride = 2 if index == 0 and layer > 1 else 1
            shortcut, twin = x, run.twin
            if self._has(f"{name}.downsample.0.weight"):
                beside = x if twin is None else ops.carry(x, twin)
                shortcut = self._conv(f"{name}.downsample.0", beside, stride)
                shortcut, twin = run.bn(f"{name}.downsample.1", shortcut, relu=False), None
            last: dict[str, Any] = {
                "residual": shortcut,
                "twin": twin,
                "output": output or name != self.block_names[-1],
            }
            if self.bottleneck:
                early = self.spec.stride_in == "conv1"
                y = self._conv(f"{name}.conv1", x, stride if early else 1)
                y = run.bn(f"{name}.bn1", y)
                y = run.bn(f"{name}.bn2", self._conv(f"{name}.conv2", y, 1 if early else stride))
                x = run.bn(f"{name}.bn3", self._conv(f"{name}.conv3", y), **last)
            else:
                y = run.bn(f"{name}.bn1", self._conv(f"{name}.conv1", x, stride))
                x = run.bn(f"{name}.bn2", self._conv(f"{name}.conv2", y), **last)
        return x


class _Pass:
    """The BatchNorms of one forward pass and what R_BN takes from them.

    The reference adds R_BN's terms layer by layer. With our kernels moments wait in chunks until
    all layers are merged at once, and the gradient of a second use goes by a twin.
    """

    def __init__(self, prior: ResNetPrior, segments: int, impl: ops.Impl):
        self.prior, self.segments, self.impl = prior, segments, impl
        self.found: list[Any] = []  # of each layer: its term, or its chunks
        self.twin: Tensor | None = None

    def stem(self, pixels: Tensor, normalised: bool) -> Tensor:
        """From the pixels to the first block."""
        prior, spec = self.prior, self.prior.spec
        mean, std = ((0.0,) * 3, (1.0,) * 3) if normalised else (spec.mean, spec.std)
        weight = prior._get("conv1.weight")
        padding = weight.shape[-1] // 2
        if self.impl == "triton" and ops.stem_conv_fits(weight, spec.stem_stride, padding):
            x = ops.stem_conv(pixels, weight, spec.stem_stride, padding, mean, std)
        else:
            x = pixels
            if not normalised:
                x = (pixels - _channels(mean, pixels)) / _channels(std, pixels)
            if x.is_cuda:
                x = x.contiguous(memory_format=torch.channels_last)
            x = prior._conv("conv1", x, spec.stem_stride)
        if not spec.maxpool:
            return self.bn("bn1", x)
        if self.impl == "triton":
            x, self.twin, chunks = ops.bn_pool_chunks(
                x, *prior._stored("bn1"), eps=spec.eps, segments=self.segments
            )
            self.found.append(chunks)
            return x
        return nn.functional.max_pool2d(self.bn("bn1", x), 3, 2, 1)

    def bn(
        self,
        name: str,
        x: Tensor,
        relu: bool = True,
        residual: Tensor | None = None,
        twin: Tensor | None = None,
        output: bool = True,
    ) -> Tensor:
        stored = self.prior._stored(name)
        shared: dict[str, Any] = {
            "eps": self.prior.spec.eps,
            "segments": self.segments,
            "relu": relu,
        }
        if self.impl == "triton":
            y, own, chunks = ops.bn_prior_chunks(
                x, *stored, residual=residual, twin=twin, output=output, **shared
            )
            self.found.append(chunks)
            # of these only a block's last y is read twice: by the next convolution and shortcut
            self.twin = own if residual is not None else None
            return y
        y, mu, sigma2 = ops.bn_prior(x, *stored, residual=residual, **shared)
        self.found.append(moment_distance(mu, sigma2, *stored[:2]))
        return y

    def total(self, first_bn: float) -> Tensor:
        if self.impl == "reference":
            return torch.stack([first_bn * self.found[0], *self.found[1:]]).sum(0)
        names = self.prior._bn_names()
        mean, var = (
            torch.cat([self.prior._get(f"{name}.running_{part}") for name in names])
            for part in ("mean", "var")
        )
        return ops.moment_distance(self.found, mean, var, first_bn)


class ModulePrior(nn.Module):
    """Any network with BatchNorm2d layers (torchvision's, timm's, your own) as a prior.

    Args:
        network: frozen and put in eval mode here.
        mean, std: of the network's input normalisation.

    Raises:
        ValueError: it has no BatchNorm2d with running statistics.

    """

    def __init__(
        self, network: nn.Module, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
    ):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.mean, self.std = mean, std
        self.batch_norms = [
            m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats
        ]
        if not self.batch_norms:
            raise ValueError(
                f"prior: {type(network).__name__} has no BatchNorm2d with running statistics;"
                " expected a network such as torchvision's resnet50"
            )
        # those with a stored variance of 0; found once, as looking waits for the device
        self.guarded = {m for m in self.batch_norms if (m.get_buffer("running_var") == 0).any()}

    @property
    def num_bn(self) -> int:
        """Number of BatchNorms in R_BN."""
        return len(self.batch_norms)

    @torch.compiler.disable  # hooks would break the graph in its middle
    def forward(self, pixels: Tensor, segments: int = 1, first_bn: float = 1.0) -> Tensor:
        """R_BN of each task; see `ResNetPrior.forward`."""
        terms: list[Tensor] = []

        def record(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
            x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
            x = x.unflatten(0, (segments, -1))
            mu, var = x.mean((1, 3, 4)), x.var((1, 3, 4), correction=0)
            factor = 1.0 if terms else first_bn
            stored_mu, stored_var = (
                layer.get_buffer("running_mean"),
                layer.get_buffer("running_var"),
            )
            terms.append(factor * moment_distance(mu, var, stored_mu, stored_var))
            if layer not in self.guarded:
                return None
            # its stored mean in, so that the channel passes on its bias alone: see ops.bn_prior
            stored = stored_mu.to(inputs[0].dtype)[:, None, None]
            return (torch.where(stored_var[:, None, None] > 0, inputs[0], stored),)

        hooks = [bn.register_forward_pre_hook(record) for bn in self.batch_norms]
        try:
            self.network((pixels - _channels(self.mean, pixels)) / _channels(self.std, pixels))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(terms).sum(0)


def load_prior(
    source: str | Path | nn.Module | None,
    *,
    stride_in: Literal["conv1", "conv2"] | None = None,
    eps: float | None = None,
) -> nn.Module | None:
    """A prior network from where its weights are.

    Args:
        source: "demo" (packaged); a file with a ResNet in torchvision's names (.safetensors, .pt);
            "torchvision:NAME" or "timm:NAME" (downloaded by those libraries); a module with
            BatchNorm2d layers, or a `Prior`; "none" or None for no prior.
        stride_in: where a bottleneck's stride is, if the file does not say; needed for files that
            are not a whole torchvision ResNet.
        eps: of its BatchNorms, likewise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a network, or something the file leaves open and nobody told.

    """
    if source is None or source == "none":
        return None
    if isinstance(source, ResNetPrior | ModulePrior):
        return source
    if isinstance(source, nn.Module):
        # a prior of the caller's own takes `segments`; any other network is wrapped
        own = "segments" in inspect.signature(source.forward).parameters
        return source if own else ModulePrior(source)
    name = str(source)
    if name == "demo":
        from fastrecycle.assets import asset

        source = asset("prior.safetensors")
    elif name.startswith("torchvision:"):
        import torchvision

        return ModulePrior(torchvision.models.get_model(name.partition(":")[2], weights="DEFAULT"))
    elif name.startswith("timm:"):
        import timm

        network = timm.create_model(name.partition(":")[2], pretrained=True)
        cfg: Any = network.pretrained_cfg
        return ModulePrior(network, tuple(cfg["mean"]), tuple(cfg["std"]))
    path = Path(source)
    metadata: dict[str, str] = {}
    tensors: Any
    if path.suffix == ".safetensors":
        tensors, metadata = load_safetensors(path)
    else:
        tensors = load_torch(path)
        tensors = tensors.get("state_dict", tensors) if isinstance(tensors, Mapping) else tensors
        if not isinstance(tensors, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
        ):
            raise ValueError(f"{path}: expected a state dict of tensors")
    try:
        return ResNetPrior(tensors, _spec(path, tensors, metadata, stride_in, eps))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(f"{path}: ") else f"{path}: {told}") from None


def _size(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def _spec(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    stride_in: Literal["conv1", "conv2"] | None,
    eps: float | None,
) -> ResNetSpec:
    expected = f"{path}: fastrecycle.prior must be an object of ResNetSpec's fields"
    told = parse_json(metadata.get("fastrecycle.prior", "{}"), expected)
    if not isinstance(told, dict):
        raise ValueError(f"{expected}, got {type(told).__name__}")
    if stride_in is not None:
        told["stride_in"] = stride_in
    if eps is not None:
        told["eps"] = eps
    whole = "fc.weight" in tensors and any(k.startswith("layer4.") for k in tensors)
    if not whole:  # not torchvision's own file, so its conventions are not known
        missing = [k for k in ("stride_in", "eps") if k not in told]
        if missing:
            raise ValueError(
                f"{path}: this ResNet is not a whole torchvision one, so {' and '.join(missing)}"
                " cannot be known from its names; tell them (--prior-stride-in conv1|conv2,"
                " --prior-eps 1e-5; load_prior(..., stride_in=, eps=))"
            )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return ResNetSpec(**{k: v for k, v in fields.items() if k in ResNetSpec.__annotations__})


def prior_metadata(spec: ResNetSpec) -> dict[str, str]:
    """The safetensors metadata from which `load_prior` restores `spec`."""
    return {"fastrecycle.prior": json.dumps(asdict(spec))}
