"""Every step worked out a second time, simply, and compared."""
