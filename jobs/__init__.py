"""The commands: each module composes the pipelines into one job, read from a configuration and run on Ray."""
