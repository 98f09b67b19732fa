"""Who a peer is and what it may do: certificates, members of a fleet, and the table of rights."""
