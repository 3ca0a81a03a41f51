"""`report.html`: its charts, pictures of tiles, words and page."""
