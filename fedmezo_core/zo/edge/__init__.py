"""A worker without torch: its adapter is arrays, and another runtime gives the losses."""
