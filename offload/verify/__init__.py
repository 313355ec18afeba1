"""Every step computed a second time, simply, and compared."""
