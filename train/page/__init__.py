"""The report of runs as one HTML page that needs nothing else: charts are SVG, made here."""
