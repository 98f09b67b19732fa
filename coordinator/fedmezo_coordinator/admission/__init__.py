"""Who is let in: the state folder of a fleet, its members on disk, joining, operators' commands."""
