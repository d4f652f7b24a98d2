"""Labelled images from folders, archives, tables and arrays, and few-shot episodes over them."""

from fastrecycle.data.episodes import Episodes, episodes

__all__ = ["Episodes", "episodes"]
