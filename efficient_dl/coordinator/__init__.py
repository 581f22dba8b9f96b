"""Which partition trains where: a pure scheduler, and the thin shell that runs it for all ranks."""
