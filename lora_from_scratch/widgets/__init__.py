"""Widgets that work in a live notebook and on a page with no kernel."""

from lora_from_scratch.widgets.rank_explorer import RankExplorer

__all__ = ["RankExplorer"]
