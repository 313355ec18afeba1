"""What a job's steps ask of its tables: rows of real tokens, by the real addresses, planner and directory."""
