"""Losses and row statistics of a linear head whose logits are never stored."""
