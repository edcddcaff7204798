"""How a federation takes faults: runs that are killed, packets that are not what they should be."""
