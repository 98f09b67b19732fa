"""Both sides of a sum that hides its terms (decision 0059): pure machines, keys and shares."""
