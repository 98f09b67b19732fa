"""The append-only, hash-chained log, its bytes and its stores. It knows no machine."""
