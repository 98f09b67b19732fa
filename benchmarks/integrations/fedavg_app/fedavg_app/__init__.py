"""FedAvg as Flower's own examples do it."""
