"""The page and the metrics that a coordinator serves to people: what they read, and who may."""
