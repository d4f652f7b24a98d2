"""Labelled images from folders, archives, tables and arrays, and few-shot episodes over them."""

from fastrecycle.data.episodes import Episodes, episodes
from fastrecycle.data.groups import Groups
from fastrecycle.data.images import ImageDataset
from fastrecycle.data.loading import load_dataset
from fastrecycle.data.ragged import RaggedEpisodes, RaggedTask, TaskSizes, meta_dataset_episodes
from fastrecycle.data.registry import DATASETS, DatasetInfo

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "Episodes",
    "Groups",
    "ImageDataset",
    "RaggedEpisodes",
    "RaggedTask",
    "TaskSizes",
    "episodes",
    "load_dataset",
    "meta_dataset_episodes",
]
