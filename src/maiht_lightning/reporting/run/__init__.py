"""One run: the table at its end, its figures and its page."""
