"""The worker: forward-only measurements on private data, for a coordinator."""
