"""Token stores are read: a corpus as token ids on disk or behind a URL, its manifest and checksums."""
