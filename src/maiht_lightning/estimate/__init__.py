"""What a run will take: memory, operations and time, predicted from a model's config alone."""
