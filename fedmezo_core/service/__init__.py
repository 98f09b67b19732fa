"""A daemon and its host: lines that a machine reads, signs of life, proxies, memory."""
