"""Lightning's hooks: when a model is pruned, frozen and distilled, and in which order."""
