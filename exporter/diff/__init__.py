"""Where an artifact leaves its reference: the first operator whose result is off, and how errors grow."""
