"""One pass of a model at several points, its weights built block by block."""
