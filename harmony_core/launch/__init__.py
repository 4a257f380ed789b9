"""Starting the ranks and knowing whether they live."""
