"""Perplexity and zero-shot accuracy."""
