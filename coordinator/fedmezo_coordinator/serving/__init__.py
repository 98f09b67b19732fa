"""Serving workers over gRPC: sessions, queues, limits."""
