"""Commands of `fedmezo` to watch runs with other means than a terminal."""
