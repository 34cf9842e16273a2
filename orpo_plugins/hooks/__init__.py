"""Everything that an author of a plugin imports."""
