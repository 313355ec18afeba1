"""The command line, and starting the ranks of a job."""
