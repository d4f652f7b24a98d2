"""fastrecycle: recycle other people's LoRAs into one meta-LoRA (LoRA Recycle, CVPR 2025)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastrecycle.classifier import FewShotClassifier
    from fastrecycle.config import InversionConfig, MetaConfig, PretuneConfig
    from fastrecycle.eval import Result, evaluate
    from fastrecycle.lora import Head, LoRA, LoRABank
    from fastrecycle.pool import SyntheticPool
    from fastrecycle.recycler import MetaLoRARecycler
    from fastrecycle.vit import ViT
    from fastrecycle.vit_config import ViTConfig, flops

__all__ = [
    "FewShotClassifier",
    "Head",
    "InversionConfig",
    "LoRA",
    "LoRABank",
    "MetaConfig",
    "MetaLoRARecycler",
    "PretuneConfig",
    "Result",
    "SyntheticPool",
    "ViT",
    "ViTConfig",
    "evaluate",
    "flops",
]

_HOME = {
    "FewShotClassifier": "classifier",
    "Head": "lora",
    "InversionConfig": "config",
    "LoRA": "lora",
    "LoRABank": "lora",
    "MetaConfig": "config",
    "MetaLoRARecycler": "recycler",
    "PretuneConfig": "config",
    "Result": "eval",
    "SyntheticPool": "pool",
    "ViT": "vit",
    "ViTConfig": "vit_config",
    "evaluate": "eval",
    "flops": "vit_config",
}


def __getattr__(name: str) -> Any:
    # On first use: `python -m fastrecycle.eval` warns where the package has imported eval before.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
