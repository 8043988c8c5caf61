"""Training from datasets: index, order, packing and feed, the worker and its trainer."""
