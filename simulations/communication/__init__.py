"""What updates cost to send, and what it costs to send less."""
