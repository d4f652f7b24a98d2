"""fastrecycle: recycle other people's LoRAs into one meta-LoRA (LoRA Recycle, CVPR 2025)."""

__version__ = "0.1.0"

from fastrecycle.classifier import FewShotClassifier
from fastrecycle.config import InversionConfig, MetaConfig, PretuneConfig
from fastrecycle.eval import Result, evaluate
from fastrecycle.lora import Head, LoRA, LoRABank
from fastrecycle.pool import SyntheticPool
from fastrecycle.recycler import MetaLoRARecycler
from fastrecycle.vit import ViT, ViTConfig, flops

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
