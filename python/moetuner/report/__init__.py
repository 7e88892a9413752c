"""Reports: advice, outcomes, structure and pages, in words, tables and charts."""
