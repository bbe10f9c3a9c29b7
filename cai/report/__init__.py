"""Reports: single HTML pages that need nothing beside them, pictures first."""

from cai.report.agreement import render_page

__all__ = ["render_page"]
