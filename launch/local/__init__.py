"""Starting ranks on this machine, and telling why one failed."""
