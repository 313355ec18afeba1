"""The device's streams, threads that give it work, and numbers that are sent to it."""
