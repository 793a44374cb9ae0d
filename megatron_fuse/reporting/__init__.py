"""What reports share: pages, tables and pictures."""
