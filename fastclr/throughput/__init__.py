"""Where a run's time goes, and what makes it faster: ``fastclr bench``."""
