"""Single peers: the book of them, how they are found and reached, and the links kept with some."""
