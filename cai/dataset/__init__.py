"""Views of records as datasets, written as Parquet with a card."""

from cai.dataset.card import choose_example, render_card
from cai.dataset.parquet import CONFIGS, write_dataset
from cai.dataset.statistics import Statistics

__all__ = ["CONFIGS", "Statistics", "choose_example", "render_card", "write_dataset"]
