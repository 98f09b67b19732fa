"""What a worker checks for a person before it takes part."""
