"""Widgets that work in a live notebook and on a page with no kernel."""

from lora_from_scratch.widgets.ablation_explorer import AblationExplorer
from lora_from_scratch.widgets.batch_scheduler import BatchScheduler
from lora_from_scratch.widgets.diffusion_explorer import DiffusionExplorer
from lora_from_scratch.widgets.memory_calculator import MemoryCalculator
from lora_from_scratch.widgets.nf4_explorer import NF4Explorer
from lora_from_scratch.widgets.rank_explorer import RankExplorer
from lora_from_scratch.widgets.reward_explorer import RewardExplorer
from lora_from_scratch.widgets.variant_diagram import VariantDiagram

__all__ = [
    "AblationExplorer",
    "BatchScheduler",
    "DiffusionExplorer",
    "MemoryCalculator",
    "NF4Explorer",
    "RankExplorer",
    "RewardExplorer",
    "VariantDiagram",
]
