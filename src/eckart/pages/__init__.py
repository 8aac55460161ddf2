"""Pages and pictures of what was found: plain JSON values in, HTML text, tables and figures out."""
