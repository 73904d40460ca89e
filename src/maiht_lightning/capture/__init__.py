"""Decoder blocks, their inputs, and the Gram matrices of their linear layers."""
