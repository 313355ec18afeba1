"""The device's streams, threads that give it work, and numbers on their way to it."""
