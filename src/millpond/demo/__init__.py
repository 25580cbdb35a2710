"""The demo: the whole loop on one machine, through the same programs and interfaces that operators use."""
