"""Reports as single HTML files: figures in, a page out. Nothing in a page is fetched, its plots' library included."""
