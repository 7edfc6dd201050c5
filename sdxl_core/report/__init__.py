"""The page a person opens after a run: one self-contained HTML file with pictures and charts."""

from sdxl_core.report.page import write_report

__all__ = ["write_report"]
