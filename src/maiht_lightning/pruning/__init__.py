"""A whole model pruned block after block, without Lightning, and the journal of it."""
