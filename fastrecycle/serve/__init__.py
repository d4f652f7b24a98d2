"""`fastrecycle serve`: show a few labelled pictures, classify others, nothing is trained."""

from fastrecycle.serve.page import check_gradio, make_page, open_page
from fastrecycle.serve.service import Answer, Example, Limits, Service, read_picture

__all__ = [
    "Answer",
    "Example",
    "Limits",
    "Service",
    "check_gradio",
    "make_page",
    "open_page",
    "read_picture",
]
