"""How pairs are laid out for one forward pass, and which models can run so."""
