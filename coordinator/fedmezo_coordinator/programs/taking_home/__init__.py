"""What a model is rebuilt from, and the small file that others rebuild it from."""
