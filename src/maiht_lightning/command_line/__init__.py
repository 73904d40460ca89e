"""The command line: its commands and their help, what errors say, what is shown, and `fit`, `prune` and `doctor`."""
