"""One page about one or several runs: numbers, figures and samples, in one HTML file that needs nothing else."""

from bondlm.report.write import write_report

__all__ = ["write_report"]
