"""What a job may say, and how a file of it is read."""
