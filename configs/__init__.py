"""Packaged YAML configurations; ``litropy configs list`` shows them."""
