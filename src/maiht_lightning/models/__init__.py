"""A Hugging Face model: its blocks and linear layers, where its weights are, its files."""
