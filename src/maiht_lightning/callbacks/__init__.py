"""Thin Lightning shells around the pruner."""
