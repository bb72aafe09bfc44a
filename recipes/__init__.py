"""LightningModules and DataModules that ``litropy fit`` trains."""

from litropy.recipes.language_model import LanguageModel
from litropy.recipes.text_data import TextDataModule

__all__ = ["LanguageModel", "TextDataModule"]
