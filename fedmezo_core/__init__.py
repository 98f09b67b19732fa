"""The contract, records, journal, machines and wire of a FedMeZO run; only `zo` needs torch."""
