"""Starting ranks on this machine, and reporting why one failed."""
