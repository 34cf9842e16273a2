"""What is known of a model, and its output head."""
