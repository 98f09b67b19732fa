"""Batteries of checks against docs/protocol.md, for any coordinator and any worker."""
