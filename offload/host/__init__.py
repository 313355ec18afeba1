"""A shard in host memory: sizes, limits, NUMA nodes, pages, pinning."""
