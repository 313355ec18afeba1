"""What a job may say, and how its file is read."""
