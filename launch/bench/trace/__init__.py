"""What a trace says of training steps."""
