"""Commands as jobs of a Ray cluster, through its job server: submit, list, read the log, stop."""
