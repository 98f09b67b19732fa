"""What a FedMeZO run is: its contract, records, journal and machines. Pure; imports no torch outside `zo`."""
