"""Ways to hold keys and values, a file each; the file's name is the method's id."""
