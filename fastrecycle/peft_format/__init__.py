"""PEFT folders in and out: adapter_config.json, adapter_model.safetensors, head.safetensors."""

from fastrecycle.peft_format.names import LAYOUTS, Layout
from fastrecycle.peft_format.reading import read_peft
from fastrecycle.peft_format.writing import write_peft

__all__ = ["LAYOUTS", "Layout", "read_peft", "write_peft"]
