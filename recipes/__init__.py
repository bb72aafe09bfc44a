"""LightningModules and DataModules that ``litropy fit`` trains."""
