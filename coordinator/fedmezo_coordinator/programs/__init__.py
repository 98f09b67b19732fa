"""The commands `fedmezo`, `fedmezo-coordinator` and `fedmezo-relay`."""
