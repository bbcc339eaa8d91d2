"""What runs an exported artifact: manifest, runners, generation and parity. Needs numpy and a runtime; never torch."""
