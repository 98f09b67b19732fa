"""What decides: pure state machines. No clock, socket, disk, thread or entropy.

Reading order: `fedmezo_core.events` and `fedmezo_core.records` (what goes in and comes out);
`rounds` (the coordinator) with `run_state` (the journal, folded) and `roster` (the workers);
`answers`, `divergence`, `cohort`, `seeds`, `rates`, `aggregate` and `health` (what it decides by);
`session` (a worker); `relay` (both at once, for a site); `state_codec` (a folded state as bytes).
"""
