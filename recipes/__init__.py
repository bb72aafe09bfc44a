"""LightningModules and DataModules that ``litropy fit`` trains."""

from litropy.recipes.entropy_sft import EntropySFT
from litropy.recipes.language_model import LanguageModel
from litropy.recipes.rlvr import RLVR
from litropy.recipes.task_data import TaskDataModule
from litropy.recipes.text_data import TextDataModule

__all__ = ["RLVR", "EntropySFT", "LanguageModel", "TaskDataModule", "TextDataModule"]
