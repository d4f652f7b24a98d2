"""The paper's tables, one command each: run what is missing, reuse what is there, write pages."""

from fastrecycle.tables.build import Request, build, find_table, write
from fastrecycle.tables.catalogue import SEPARATE, TABLES
from fastrecycle.tables.layout import published
from fastrecycle.tables.scales import SCALES, Scale, ScaleName
from fastrecycle.tables.store import Store
from fastrecycle.tables.toys import one_thread, toy_world
from fastrecycle.tables.world import Registered, World

__all__ = [
    "SCALES",
    "SEPARATE",
    "TABLES",
    "Registered",
    "Request",
    "Scale",
    "ScaleName",
    "Store",
    "World",
    "build",
    "find_table",
    "one_thread",
    "published",
    "toy_world",
    "write",
]
