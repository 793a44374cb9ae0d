"""Pages, tables and pictures, which all reports share."""
