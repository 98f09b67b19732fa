"""What a server says of itself to probes and tools: its health, and what its services are."""
