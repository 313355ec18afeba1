"""Engines that carry records between host memory and the window."""
