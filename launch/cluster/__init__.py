"""Jobs on many machines: the place of a rank that another launcher started, and what starts ranks elsewhere."""
