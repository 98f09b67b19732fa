"""What a person asks for before a run begins: recipes, and whether all is in place."""
