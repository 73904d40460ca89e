"""What a run leaves behind to be read: tables, files, logger entries."""
