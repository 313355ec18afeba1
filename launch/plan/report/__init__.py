"""What was counted, as tables for people and as JSON for programs."""
