"""Measurements: `blt bench WHAT`, one line of JSON each."""
