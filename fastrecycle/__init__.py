"""fastrecycle: recycle other people's LoRAs into one meta-LoRA (LoRA Recycle, CVPR 2025)."""

__version__ = "0.1.0"
