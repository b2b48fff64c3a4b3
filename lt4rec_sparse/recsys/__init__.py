"""Ranking from a click log: data, models, training, and the product's run from log to frozen ranker."""
