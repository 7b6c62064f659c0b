"""What every competition shares: transport, payloads, gateway and server templates."""
