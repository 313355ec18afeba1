"""Text and stores that lie elsewhere: files by URL, a hub's files, and patience with servers."""
