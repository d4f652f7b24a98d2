"""The packaged demo: a small backbone, a prior network, a bank of LoRAs and a meta-LoRA."""

from __future__ import annotations

from pathlib import Path


def asset(name: str) -> Path:
    """Path of a packaged file or folder: "vit.safetensors", "prior.safetensors", "bank", ...

    Raises:
        FileNotFoundError: this installation lacks it.

    """
    path = Path(__file__).parent / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing from this installation; reinstall fastrecycle")
    return path
