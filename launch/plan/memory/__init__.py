"""What a job takes of devices and hosts, and what makes it fit."""
