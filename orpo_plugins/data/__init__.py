"""From rows of a dataset to batches."""
