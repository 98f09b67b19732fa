"""What a daemon owes whoever operates it: lines that a machine reads, and signs of life."""
