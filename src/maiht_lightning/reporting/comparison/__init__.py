"""Many runs: their rows, a table, a figure, a W&B Report."""
