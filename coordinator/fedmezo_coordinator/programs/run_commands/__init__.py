"""The commands `fedmezo run ...`: creating, watching and ending the runs of a coordinator."""
