"""The runs that one process hosts: their folders, their lives, and the orders to them."""
