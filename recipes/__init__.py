"""LightningModules and DataModules that ``litropy fit`` trains."""

from litropy.recipes.language_model import LanguageModel

__all__ = ["LanguageModel"]
