"""Models: their output head, checks before training, and what has been found out about them."""
