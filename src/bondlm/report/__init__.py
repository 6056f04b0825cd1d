"""A page about one or several runs: numbers, figures and samples in one self-contained HTML file."""

from bondlm.report.write import write_report

__all__ = ["write_report"]
