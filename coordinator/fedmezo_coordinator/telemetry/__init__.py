"""What other programs are told of a run: its rounds as traces."""
