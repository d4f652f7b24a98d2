"""Labelled images from folders, archives, tables and arrays, and few-shot episodes over them."""

from fastrecycle.data.episodes import Episodes, episodes
from fastrecycle.data.images import ImageDataset
from fastrecycle.data.loading import load_dataset
from fastrecycle.data.registry import DATASETS, DatasetInfo

__all__ = ["DATASETS", "DatasetInfo", "Episodes", "ImageDataset", "episodes", "load_dataset"]
