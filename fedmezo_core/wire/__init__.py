"""What parties say to one another over gRPC, and how a party reads a run."""
