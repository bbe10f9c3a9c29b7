"""Reports: single HTML pages that need nothing beside them, pictures first."""

from cai.report.agreement import render_page
from cai.report.training import render_training

__all__ = ["render_page", "render_training"]
