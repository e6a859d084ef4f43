"""What serves: the command line, files and their formats, run folders, optimizer, statistics."""
