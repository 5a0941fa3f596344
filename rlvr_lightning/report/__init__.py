"""A report of one run or several: a page that needs nothing else, or Markdown."""
