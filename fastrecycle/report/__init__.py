"""A run's folder to look at: report.md with its pictures, gallery.png, and one HTML page."""

from fastrecycle.report.contents import RunContents, read_run
from fastrecycle.report.figures import plot_gallery, plot_metrics, plot_pool, write_figure
from fastrecycle.report.page import PageOptions, write_page
from fastrecycle.report.plain import write_report
from fastrecycle.report.tables import Evaluation, markdown_table, read_metrics, text_table

__all__ = [
    "Evaluation",
    "PageOptions",
    "RunContents",
    "markdown_table",
    "plot_gallery",
    "plot_metrics",
    "plot_pool",
    "read_metrics",
    "read_run",
    "text_table",
    "write_figure",
    "write_page",
    "write_report",
]
