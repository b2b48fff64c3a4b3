"""The report that a ranking engineer reads: verdict, warnings, next steps, tables and plots, in Markdown and HTML."""

from lt4rec_sparse.recsys.report.page import render, worded, write_page
from lt4rec_sparse.recsys.report.results import Results
from lt4rec_sparse.recsys.report.sections import write_report
from lt4rec_sparse.recsys.report.verdict import verdict
from lt4rec_sparse.recsys.report.warned import Warned, warned

__all__ = ["Results", "Warned", "render", "verdict", "warned", "worded", "write_page", "write_report"]
